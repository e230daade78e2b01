"""Pictures and films to language embeddings: Qwen2.5-VL's own vision tower; its merger is the vision adapter."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionRotaryEmbedding,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from nexus.model.fused import attend, fuse_norms
from nexus.organs import VisionConfig
from nexus.types import Encoded, Sight


def packed_attention(
    q: Float[Tensor, "P H d"],
    k: Float[Tensor, "P H d"],
    v: Float[Tensor, "P H d"],
    lengths: Sequence[int],
    fused: bool = False,
) -> Float[Tensor, "P H d"]:
    """Attention inside consecutive runs of the given lengths, computed for all runs of one length together.

    The reference loops over runs, which on a CPU costs a call per window and layer. `fused` leaves the sums to torch's
    scaled_dot_product_attention, which keeps no table of weights.
    """
    out = torch.empty_like(v)
    starts = torch.tensor([0, *lengths[:-1]], device="cpu").cumsum(0)
    for length in sorted(set(lengths)):
        begin = starts[[n == length for n in lengths]]
        index = (begin[:, None] + torch.arange(length)).to(q.device)  # [runs, length]
        qs, ks, vs = (x[index].transpose(1, 2) for x in (q, k, v))  # [runs, H, length, d]
        if fused:
            out[index] = nn.functional.scaled_dot_product_attention(qs, ks, vs).transpose(1, 2)
            continue
        out[index] = attend(qs, ks, vs, scale=q.shape[-1] ** -0.5).transpose(1, 2).to(out.dtype)
    return out


class Vision(nn.Module):
    """The organ. `tower` is the transformers module (weights, names and inference); training uses a batched path."""

    def __init__(self, config: VisionConfig, language_width: int) -> None:
        super().__init__()
        self.config = config
        published = Qwen2_5_VLVisionConfig(
            depth=config.layers,
            hidden_size=config.width,
            num_heads=config.heads,
            intermediate_size=config.ffn_width,
            patch_size=config.patch,
            spatial_merge_size=config.merge,
            temporal_patch_size=config.temporal_patch,
            window_size=config.window,
            tokens_per_second=config.tokens_per_second,
            fullatt_block_indexes=list(config.full_attention_layers),
            out_hidden_size=language_width,
        )
        published._attn_implementation = config.attention
        self.checkpointing = False
        self.tower = Qwen2_5_VisionTransformerPretrainedModel(published)
        with torch.device("cpu"):  # its numbers are in no checkpoint: they are real also on the meta device
            self.tower.rotary_pos_emb = Qwen2_5_VLVisionRotaryEmbedding(published)
        fuse_norms(self.tower)

    def _windows(self, grids: Tensor) -> tuple[Tensor, list[int]]:
        """Order of merged tokens by window, and the patches in each window."""
        index, ends = get_vision_window_index(grids, self.config.merge, self.config.window, self.config.patch)
        return index, ends.diff().tolist()

    def encode(self, sight: Sight) -> Float[Tensor, "P width"]:
        """Tower states before the merger, in window order."""
        tower, grids = self.tower, sight.grids
        rows = sight.rows.to(tower.patch_embed.proj.weight.device)
        index, windows = self._windows(grids)
        whole = (grids[:, 1] * grids[:, 2]).repeat_interleave(grids[:, 0]).tolist()  # full attention: per time step
        unit = self.config.merge**2

        def by_window(x: Tensor) -> Tensor:
            return x.reshape(len(x) // unit, unit, -1)[index].reshape(len(x), -1)

        filters = tower.patch_embed.proj.weight  # as large as its stride, this convolution is a product of matrices
        x = by_window(nn.functional.linear(rows.to(filters.dtype), filters.flatten(1)))
        positions = get_vision_position_ids(grids, self.config.merge).to(x.device)
        cosines, sines = (by_window(f) for f in tower.rotary_pos_emb(x, positions))
        for number, layer in enumerate(tower.blocks):
            lengths = whole if number in self.config.full_attention_layers else windows
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._layer, layer, x, lengths, cosines, sines, use_reentrant=False)
            else:
                x = self._layer(layer, x, lengths, cosines, sines)
        return x

    def _layer(self, layer: nn.Module, x: Tensor, lengths: Sequence[int], cosines: Tensor, sines: Tensor) -> Tensor:
        block: Any = layer  # transformers' modules are not typed below this point
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, self.config.heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, cosines, sines)
        mixed = packed_attention(q, k, v, lengths, fused=self.config.attention == "sdpa")
        x = x + block.attn.proj(mixed.flatten(1))
        return x + block.mlp(block.norm2(x))

    def forward(self, sight: Sight) -> Encoded:
        """Embeddings of all items, packed: grid / 4 tokens each."""
        tokens = (sight.grids.prod(1) // self.config.merge**2).tolist()
        if not torch.is_grad_enabled():
            rows = sight.rows.to(self.tower.patch_embed.proj.weight.device)
            return Encoded(self.tower(rows, sight.grids.to(rows.device)).pooler_output, tokens)  # as published, exactly
        index, _ = self._windows(sight.grids)
        return Encoded(self.tower.merger(self.encode(sight))[index.argsort()], tokens)
