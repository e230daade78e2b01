"""Attention and norm as one node each give the numbers and gradients of the published ones, written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, eager_attention_forward
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from nexus.model.fused import RMSNorm, attend
from nexus.model.layers import causal_bias, padding_bias

HIDDEN = st.sampled_from(["none", "rows", "past"])
LOOSE = {"atol": 0.05, "rtol": 0.05}  # a bfloat16 has eight bits


class Published(nn.Module):
    """What transformers' written-out attention reads of its layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def walked_back(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(out.shape, generator=generator).to(out.dtype)
    return list(torch.autograd.grad(out, inputs, gradient, retain_graph=True))


@settings(max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 9),
    HIDDEN,
)
def test_attention_is_the_published_one_and_so_are_its_gradients(
    rows: int, keys: int, groups: int, length: int, hidden: str
) -> None:
    generator = torch.Generator().manual_seed(rows * length)
    shapes = ((rows, keys * groups, length, 8), (rows, keys, length, 8), (rows, keys, length, 8))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    biases = {"rows": padding_bias(torch.randint(1, length + 1, (rows,)), length), "past": causal_bias(length)}
    bias = biases.get(hidden)
    wanted = eager_attention_forward(Published(groups), *inputs, bias, 0.3)[0].transpose(1, 2)
    given_ = attend(*inputs, bias, 0.3)
    assert_close(given_, wanted, atol=1e-6, rtol=1e-6)
    for found, right in zip(walked_back(given_, inputs), walked_back(wanted, inputs), strict=True):
        assert_close(found, right, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = attend(*inputs, bias, 0.3)
    assert rough.dtype == torch.bfloat16
    assert_close(rough.float(), wanted, **LOOSE)
    for found, right in zip(walked_back(rough, inputs), walked_back(wanted, inputs), strict=True):
        assert found.dtype == torch.float32
        assert_close(found, right, **LOOSE)


def test_who_sees_nobody_gets_numbers_in_mixed_precision() -> None:
    """Padding on the left of a prompt; its states are looked at by nobody, but not-a-number would spread."""
    q = torch.randn(1, 2, 3, 8)
    bias = torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min)
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(attend(q, q, q, bias).isfinite().all())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_norm_is_the_published_one_bit_for_bit_and_its_gradients_are_those(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    published, ours = Qwen2RMSNorm(48, eps=1e-5).to(kind), RMSNorm(48, eps=1e-5).to(kind)
    nn.init.normal_(published.weight)
    ours.load_state_dict(published.state_dict())
    x = (3 * torch.randn(2, 7, 48) + 1).to(kind).requires_grad_()
    wanted, given_ = published(x), ours(x)
    assert given_.dtype == kind and torch.equal(given_, wanted)
    close = {"atol": 1e-5, "rtol": 1e-5} if kind == torch.float32 else LOOSE
    pairs = zip(walked_back(given_, [x, ours.weight]), walked_back(wanted, [x, published.weight]), strict=True)
    for found, right in pairs:
        assert_close(found, right, **close)


def test_a_model_holds_our_norms_under_the_published_names() -> None:
    model = tiny_model()
    assert model.vision is not None
    modules = [*model.language.modules(), *model.vision.modules()]
    assert not any(isinstance(module, Qwen2RMSNorm | Qwen2_5_VLRMSNorm) for module in modules)
    assert sum(isinstance(module, RMSNorm) for module in modules) > 4
    assert {"backbone.norm.weight", "backbone.layers.0.input_layernorm.weight"} <= set(model.language.state_dict())
