"""Attention and RMS norm, each one node of the graph that training walks back.

Written out operation by operation, both cost more than the products around them when a small model trains on a CPU:
there every pass over memory counts, and what mixes types is slow: adding a float32 bias to bfloat16 scores takes four
times as long as the product that made them. The sums are those of the published modules; what is kept for the way back
is less.

For short sequences attention is still a product, a softmax and a product: `scaled_dot_product_attention` is slower in
training on a CPU, where its backward pass dominates.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm


def attend(
    queries: Float[Tensor, "B H T d"],
    keys: Float[Tensor, "B J S d"],
    values: Float[Tensor, "B J S d"],
    bias: Float[Tensor, "#B #H #T S"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "B H T d"]:
    """softmax(scale Q K^T + bias) V, in the autocast type where there is one. H is a multiple of J: neighbouring heads
    share keys and values (grouped-query attention)."""
    kind = autocast_type(values)
    mixed: Tensor = _Attend.apply(*(x.to(kind) for x in (queries, keys, values)), bias, scale)
    return mixed


def autocast_type(x: Tensor) -> torch.dtype:
    """What products with `x` are computed in: the autocast type where there is one, else its own."""
    where = x.device.type
    if torch.amp.is_autocast_available(where) and torch.is_autocast_enabled(where):
        return torch.get_autocast_dtype(where)
    return x.dtype


class _Attend(torch.autograd.Function):
    """Keeps queries, keys, values and weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        ctx.heads, ctx.scale = q.shape, scale
        q = _grouped(q, k)
        scores = (q @ k.transpose(-1, -2)).view(*ctx.heads[:3], k.shape[2]).mul_(scale)
        if bias is not None:
            scores += bias if bias.dtype == scores.dtype else bias.clamp_min(torch.finfo(q.dtype).min).to(q.dtype)
        weights = torch._softmax(scores, -1, False)  # sums in float32; autocast would also make its outcome float32
        ctx.save_for_backward(q, k, v, weights)
        return (_grouped(weights, k) @ v).view(ctx.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        gradient = _grouped(gradient, k)
        to_weights = (gradient @ v.transpose(-1, -2)).view_as(weights)
        to_scores = _grouped(torch._softmax_backward_data(to_weights, weights, -1, weights.dtype), k)
        to_values = _grouped(weights, k).transpose(-1, -2) @ gradient
        to_queries, to_keys = (to_scores @ k).view(ctx.heads), to_scores.transpose(-1, -2) @ q
        return to_queries.mul_(ctx.scale), to_keys.mul_(ctx.scale), to_values, None, None


def _grouped(x: Float[Tensor, "B H T _"], keys: Float[Tensor, "B J S d"]) -> Float[Tensor, "B J gT _"]:
    """Heads that share keys one below the other."""
    return x.reshape(len(x), keys.shape[1], -1, x.shape[-1])


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 and given in the type of its input (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return normed


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number of each row. The way back is that of a layer norm whose mean is 0, and what it
    takes away so that the gradient has none is given back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = ((wide * wide).mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (weight * (wide * scale).to(x.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        gradient, wide, w = gradient.float(), x.float(), weight.float()
        to_x, to_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, wide, [x.shape[-1]], torch.zeros_like(scale), scale, w, None, [True, True, False]
        )
        mean = (gradient @ w / x.shape[-1]).unsqueeze(-1)
        return (to_x + mean * scale).to(x.dtype), to_weight.to(weight.dtype), None


def fuse_norms(published: nn.Module) -> None:
    """Put our norm, of the same sums, in the place of transformers' own."""
    for module in list(published.modules()):
        for name, child in module.named_children():
            if isinstance(child, Qwen2RMSNorm | Qwen2_5_VLRMSNorm):
                norm = RMSNorm(len(child.weight), child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
