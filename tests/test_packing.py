"""Rows laid end to end give the numbers of the padded batch: outputs, losses, gradients; and cost fewer positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_film, tiny_model, tiny_picture, tiny_recipe, tiny_sound, tiny_tokenizer
from torch import Tensor
from torch.testing import assert_close

from nexus.data.chat import render, task_turns
from nexus.data.collate import collate, sound
from nexus.model.hearing import WhisperEncoder
from nexus.model.omni import OmniModel
from nexus.model.packing import GRAIN, PREFIX, SHORT, UNUSED, packed
from nexus.types import Batch, Text, Turn

TOKENIZER = tiny_tokenizer()
LENGTHS = st.lists(st.integers(3, 40), min_size=1, max_size=12) | st.lists(st.integers(3, 300), min_size=2, max_size=5)


def ask(*parts: object, reply: str) -> tuple[Turn, ...]:
    return Turn("user", parts), Turn("assistant", (Text(reply),))  # type: ignore[arg-type]


def mixed(model: OmniModel) -> Batch:
    """A batch in which every medium and very different lengths occur."""
    talks = [
        task_turns("asr", sound=tiny_sound(0.4), text="two red"),
        task_turns("chat", sound=tiny_sound(2.6, 1), text="blue circle please"),
        ask(tiny_picture(), Text("what is"), reply="seven"),
        ask(tiny_film(), Text("where is the circle"), reply="left"),
        ask(Text("what is two plus three"), reply="five"),
        (*ask(Text("how many"), reply="two"), *ask(tiny_picture(seed=1), Text("say"), reply="three")),
        ask(Text("say"), reply="seven"),
    ]
    return collate([render(talk, TOKENIZER, model.config) for talk in talks], TOKENIZER.pad, model.config)


def learned(model: OmniModel, batch: Batch, pack: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and every gradient."""
    model.pack(pack)
    model.zero_grad()
    loss = model(batch)["text"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2"])
def test_packed_rows_give_the_loss_and_the_gradients_of_padded_ones(kind: str, attention: str) -> None:
    axes = "mrope_section: null, " if kind == "qwen2" else "mrope_section: [2, 3, 3], "
    model = tiny_model(
        0,
        f"model.language={{type: {kind}, vocab_size: 400, width: 32, layers: 2, heads: 2, kv_heads: 1, ffn_width: 64,"
        f" {axes}rope_theta: 10000.0, max_positions: 1024, attention: {attention}}}",
    ).train()
    batch = mixed(model)
    padded, wanted = learned(model, batch, False)
    loss, given_ = learned(model, batch, True)
    assert_close(loss, padded, atol=1e-6, rtol=1e-6)
    assert given_.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(given_[name], gradient, atol=2e-6, rtol=1e-4, msg=lambda said, name=name: f"{name}: {said}")


def test_the_prefix_of_all_rows_is_computed_once_a_pack() -> None:
    model = tiny_model().train()
    model.pack(True)
    batch = mixed(model)
    seen: list[int] = []
    backbone = model.language.backbone.layers[0]
    backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[:2].numel()))
    model(batch)
    # Fewer than even the rows' own positions: they share the system prompt.
    assert seen[0] < int(batch.mask.sum()) < batch.mask.numel()


@pytest.mark.parametrize("positions", ["rope", "sinusoidal"])
def test_packed_windows_of_sound_give_the_states_of_padded_ones(positions: str) -> None:
    hearing = tiny_recipe().model.hearing
    assert hearing is not None
    torch.manual_seed(0)
    encoder = WhisperEncoder(hearing.encoder.model_copy(update={"positions": positions}))
    heard = sound([tiny_sound(seconds, seed) for seed, seconds in enumerate((0.3, 2.9, 0.7, 1.1, 0.2))], hearing)
    assert heard is not None
    padded = encoder(heard.mel, heard.lengths)
    encoder.packing = True
    given_ = encoder(heard.mel, heard.lengths)
    assert given_.shape == padded.shape
    for row, frames in enumerate(hearing.encoder.frames_for(int(n)) for n in heard.lengths):
        assert_close(given_[row, :frames], padded[row, :frames], atol=2e-6, rtol=1e-5)


@settings(max_examples=150)
@given(LENGTHS, st.data())
def test_every_position_has_its_place_and_sees_its_own_row_and_the_prefix(
    lengths: list[int], data: st.DataObject
) -> None:
    shared = data.draw(st.integers(0, min(lengths) - 1))
    longest = max(lengths) + data.draw(st.integers(0, 3))
    layout = packed(lengths, longest, 16, shared)
    if layout is None:  # nothing to save
        return
    assert layout.source.numel() < len(lengths) * longest
    assert layout.source.shape[1] <= max(longest, SHORT)
    assert layout.source.shape[1] % GRAIN == 0 or layout.source.shape[1] == longest
    flat = torch.arange(len(lengths) * longest).view(len(lengths), longest)
    back = layout.unpack(layout.pack(flat))
    segments, sees = layout.segment.flatten(), layout.sees(True)
    for row, length in enumerate(lengths):
        assert back[row, shared:length].tolist() == flat[row, shared:length].tolist()
        # A prefix lies once in a pack, copied from some row: the same column, whatever the row.
        assert (back[row, :shared] % longest).tolist() == list(range(shared))
        for column in range(length):
            place = int(layout.place[row, column])
            pack, at = divmod(place, layout.source.shape[1])
            shown = layout.source[pack, sees[pack, 0, at]] % longest
            assert shown.tolist() == list(range(column + 1))
            assert int(segments[place]) == (PREFIX if column < shared else row)
    assert bool(sees.any(-1).all())
    assert int((segments == UNUSED).sum()) < layout.source.numel()


def test_batches_of_ever_other_lengths_have_few_shapes() -> None:
    """Every shape of a product is compiled once; the batches themselves have as many shapes as there are."""
    draws = [torch.randint(20, 250, (38,), generator=torch.Generator().manual_seed(step)) for step in range(300)]
    shapes = {layout.source.shape for draw in draws if (layout := packed(draw.tolist(), int(draw.max()), 256, 20))}
    assert len(shapes) < 15 < len({int(draw.sum()) for draw in draws})


def test_what_saves_nothing_is_not_packed() -> None:
    assert packed([7, 7, 7], 7, 16) is None
    assert packed([5], 5, 16) is None
    assert packed([0, 0], 4, 16) is None
