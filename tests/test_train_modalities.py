"""Ranks with different media take the same steps: what is added to a batch changes no loss and no gradient."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import sample
from tiny import spelled, tiny_model, tiny_recipe, tiny_tokenizer

from nexus.errors import BadRecord
from nexus.model.omni import OmniModel
from nexus.train.loader import batch_of
from nexus.train.modalities import Load, complete, padding_shares, shares, total, weigh
from nexus.types import IGNORE, Batch, Sample, Script, SpeechBatch, Text, Turn

INTERNVIT = (
    "model.vision={type: internvit, width: 32, layers: 2, heads: 2, ffn_width: 64, side: 56, projector_width: 48}"
)
BOTH = Load(sound=1, sight=1)


def batch(kinds: str, rows: int = 2) -> Batch:
    return batch_of([sample(n, kinds) for n in range(rows)], tiny_tokenizer(), tiny_recipe().model)


def gradients(model: OmniModel, of: Batch) -> tuple[float, dict[str, torch.Tensor | None]]:
    model.zero_grad(set_to_none=True)
    loss = model(of)["text"]
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("overrides", [(), (INTERNVIT,)], ids=["qwen", "internvit"])
@pytest.mark.parametrize("kinds", ["t", "a", "i"])
def test_what_is_added_runs_its_organ_and_teaches_nothing(kinds: str, overrides: tuple[str, ...]) -> None:
    model = tiny_model(0, *overrides)
    rows = [sample(n, kinds) for n in range(2)]
    alone = batch_of(rows, tiny_tokenizer(), model.config)
    filled = complete(alone, BOTH, model.config)
    assert filled.sound is not None and filled.sight is not None
    loss, before = gradients(model, alone)
    loss_filled, after = gradients(model, filled)
    assert loss_filled == pytest.approx(loss, abs=1e-5)
    for name, gradient in after.items():
        if not name.startswith(("hearing.", "vision.", "language.")):
            continue
        assert gradient is not None, f"{name} had no part: another rank would wait for it"
        reference = before[name] if before[name] is not None else torch.zeros_like(gradient)
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5)


def test_a_batch_that_lacks_nothing_is_left_alone() -> None:
    whole = batch("ai")
    assert complete(whole, BOTH, tiny_recipe().model) is whole
    text = batch("t")
    assert complete(text, Load(), tiny_recipe().model) is text


def test_a_batch_without_a_label_is_refused() -> None:
    text = batch("t")
    empty = Batch(text.tokens, torch.full_like(text.labels, IGNORE), text.mask, [])
    with pytest.raises(BadRecord, match="2 rows holds no label, expected the text of an assistant's turn"):
        weigh(empty)


def test_counts_are_those_of_the_rows() -> None:
    load = weigh(batch("at"))
    assert (load.rows, load.sound, load.sight, load.speech) == (2, 1, 0, 0)
    assert 0 < load.labels < load.tokens < load.padded_tokens
    assert load.audio_frames == load.padded_audio_frames == 30
    lengths = torch.tensor([7, 5])
    script = Script(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), spelled(torch.ones(2, 3)), torch.tensor([3, 1]))
    speech = weigh(SpeechBatch(script, torch.zeros(2, 8, 7).long(), lengths))
    assert (speech.labels, speech.tokens, speech.padded_tokens) == (8 * (8 + 6), 4, 6)
    assert (speech.audio_frames, speech.padded_audio_frames, speech.speech) == (12, 14, 1)
    assert padding_shares(speech)["audio_padding"] == pytest.approx(1 / 7)


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=4), min_size=1, max_size=5))
def test_weights_of_micro_batches_are_those_of_one_mean_over_all_labels(ranks: list[list[int]]) -> None:
    micro = min(map(len, ranks))
    loads = [[Load(labels=count) for count in counts[:micro]] for counts in ranks]
    together = [total([rank[n] for rank in loads]) for n in range(micro)]
    weights = [shares(rank, together) for rank in loads]
    assert sum(map(sum, weights)) == pytest.approx(1.0)
    everything = sum(load.labels for rank in loads for load in rank)
    assert all(
        weight == pytest.approx(load.labels / everything)
        for rank, own in zip(loads, weights, strict=True)
        for load, weight in zip(rank, own, strict=True)
    )


def test_a_row_whose_file_is_gone_is_named(tmp_path: Path) -> None:
    from nexus.types import Image

    turns = (Turn("user", (Image(path=tmp_path / "gone.png"),)), Turn("assistant", (Text("two"),)))
    with pytest.raises(Exception, match=r"row data.jsonl:4: .*gone.png"):
        batch_of([Sample("data.jsonl:4", "vqa", turns)], tiny_tokenizer(), tiny_recipe().model)
