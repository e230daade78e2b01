"""The voice's settings, one position at a time against whole sequences, and its decode-only forms."""

import copy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import spelled
from torch import Tensor, nn
from torch.testing import assert_close

from nexus.bench.decoder import Heat, as_voice, peer_of
from nexus.errors import BadConfig
from nexus.model.voice.delayed import DelayedVoice, Int8Voice, delay
from nexus.model.voice.matrices import dense, int8, quantise
from nexus.model.voice.speaking import Speaking
from nexus.organs import VoiceConfig
from nexus.types import Script

WIDTH, SIZE = 48, 14
MUSICGEN = {"norm": "layer", "feed_forward": "gelu", "positions": "sinusoidal", "fusion": "codes"}
EVERY = list(product(("rms", "layer"), ("gated", "gelu"), ("rope", "sinusoidal"), ("mean9", "half", "sum", "codes")))


def voice(dtype: torch.dtype = torch.float32, **changes: object) -> DelayedVoice:
    """A voice whose scores are far from equal."""
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 2, "heads": 2, "ffn_width": 64, "books": 3, "book_size": SIZE}
    made = DelayedVoice(VoiceConfig.model_validate({**sizes, **changes}), WIDTH).eval()
    for name, parameter in made.named_parameters():
        if name in ("start_vector", "silence", "heads.weight") or "norm" in name:
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return made.to(dtype)


def script(rows: int, words: int, dtype: torch.dtype = torch.float32) -> Script:
    generator = torch.Generator().manual_seed(1)
    states, embeds = torch.randn(2, rows, words, WIDTH, generator=generator).to(dtype)
    letters = spelled(torch.randint(0, 5, (rows, words), generator=generator))
    return Script(states, embeds, letters, torch.full((rows,), words))


def columns(made: Speaking, rows: int, frames: int) -> Tensor:
    codes = torch.randint(SIZE, (rows, made.config.books, frames), generator=torch.Generator().manual_seed(2))
    return delay(codes, torch.full((rows,), frames), made.pad, made.eos)


def stepped(made: Speaking, text: Script, delayed: Tensor) -> Tensor:
    """Scores [B, S2, K, C2] of given columns, one step at a time, all rows at one pace."""
    rows = list(range(len(delayed)))
    state = made.start(len(rows))
    for row in rows:
        made.hear(state, row, text.states[row], text.embeds[row], text.letters[row])
        made.end(state, row)
    scores = []
    for step in range(delayed.shape[2] - made.config.books + 1):
        scores.append(made.scores(state, rows))
        made.take(state, rows, delayed[:, :, step])
    return torch.stack(scores, dim=1)


def assert_same_scores(mine: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Equal wherever the steps allow a code: they hide the end where it may not be said."""
    allowed = mine.isfinite()
    assert int(allowed.sum()) >= mine.numel() * SIZE // (SIZE + 2)
    assert_close(mine[allowed], theirs[:, : mine.shape[1]][allowed], atol=tolerance, rtol=0)


@pytest.mark.parametrize("books", [1, 3])
@pytest.mark.parametrize(("norm", "feed_forward", "positions", "fusion"), EVERY)
@torch.no_grad()
def test_one_step_at_a_time_scores_as_the_whole_sequence_does_in_every_setting(
    norm: str, feed_forward: str, positions: str, fusion: str, books: int
) -> None:
    made = voice(norm=norm, feed_forward=feed_forward, positions=positions, fusion=fusion, books=books)
    text, delayed = script(2, 4), columns(made, 2, 7)
    assert_same_scores(stepped(made, text, delayed), made.logits(text, delayed), 1e-5)


@torch.no_grad()
def test_every_setting_changes_the_scores() -> None:
    text = script(1, 4)
    scores = [
        voice(norm=norm, feed_forward=feed_forward, positions=positions, fusion=fusion)
        .logits(text, columns(voice(), 1, 7))
        .nan_to_num(neginf=0)
        for norm, feed_forward, positions, fusion in EVERY
    ]
    for one in range(len(scores)):
        for other in range(one):
            assert (scores[one] - scores[other]).abs().max() > 1e-3


@torch.no_grad()
def test_steps_go_on_behind_the_memory_a_row_starts_with() -> None:
    made = voice()
    text, delayed = script(1, 4), columns(made, 1, 300)
    assert_same_scores(stepped(made, text, delayed), made.logits(text, delayed), 2e-5)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=3, max_size=14), st.sampled_from(["rope", "sinusoidal"])
)
@torch.no_grad()
def test_rows_at_any_pace_are_scored_as_they_are_alone(turns: list[set[int]], positions: str) -> None:
    made = voice(positions=positions)
    text, delayed = script(3, 9), columns(made, 3, len(turns))
    alone = made.logits(text, delayed)
    state = made.start(3)
    for row in range(3):
        made.hear(state, row, text.states[row], text.embeds[row], text.letters[row])
    for turn in turns:
        rows = sorted(turn)
        at = [state.rows[row].step for row in rows]
        scores = made.scores(state, rows)
        expected = torch.stack([alone[row, step] for row, step in zip(rows, at, strict=True)])
        allowed = scores.isfinite()
        assert_close(scores[allowed], expected[allowed], atol=1e-5, rtol=0)
        made.take(state, rows, torch.stack([delayed[row, :, step] for row, step in zip(rows, at, strict=True)]))


@pytest.mark.parametrize("positions", ["rope", "sinusoidal"])
@torch.no_grad()
def test_steps_that_only_the_device_knows_give_the_same_scores(positions: str) -> None:
    decoder = voice(positions=positions).speech().decoder
    one, other = decoder.memory(2, 8), decoder.memory(2, 8)
    for step in range(5):
        x = torch.randn(2, 32)
        expected = decoder.scores(x, one, [0, 1], [step, step])
        assert_close(decoder.scores_anywhere(x, other, torch.tensor([step, step])), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("books", [1, 4])
@torch.no_grad()
def test_with_its_settings_and_weights_the_decoder_is_musicgens(books: int) -> None:
    theirs = peer_of(Heat(32, 2, 2, {}, layers=2, books=books, book_size=SIZE))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = as_voice(theirs)
    text, delayed = script(2, 9), columns(ours, 2, 12)  # the text only says how long there is to speak
    shown = torch.cat([torch.full((2, books, 1), SIZE), delayed[:, :, :-1]], dim=2)  # [B, K, S2]
    expected = theirs(input_ids=shown.flatten(0, 1)).logits.unflatten(0, (2, books)).permute(0, 2, 1, 3)
    mine = ours.logits(text, delayed)
    allowed = mine.isfinite()
    assert int((~allowed).sum()) == mine.numel() // (SIZE + 2), "PAD alone is never allowed"
    assert_close(mine[allowed], expected[allowed], atol=1e-5, rtol=0)
    assert_same_scores(stepped(ours, text, delayed), expected, 1e-5)


@pytest.mark.parametrize("fusion", ["mean9", "codes"])
def test_in_bfloat16_everything_runs_and_scores_are_float32(fusion: str) -> None:
    made = voice(torch.bfloat16, fusion=fusion, feed_forward="gelu", norm="layer")
    text, delayed = script(2, 4, torch.bfloat16), columns(made, 2, 7)
    losses = made.loss(text, torch.randint(SIZE, (2, 3, 6)), torch.tensor([6, 4]))
    losses["speech"].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in made.blocks.parameters())
    with torch.no_grad():
        whole, steps = made.logits(text, delayed), stepped(made, text, delayed)
        wide = copy.deepcopy(made).float().logits(script(2, 4), delayed)
    assert whole.dtype == steps.dtype == torch.float32
    spread = float(whole[whole.isfinite()].std())
    assert_same_scores(steps, whole, 0.15 * spread)
    assert_same_scores(steps, wide, 0.15 * spread)


def test_a_voice_can_be_made_on_the_meta_device() -> None:
    for positions, fusion in product(("rope", "sinusoidal"), ("mean9", "codes")):
        config = voice(positions=positions, fusion=fusion).config
        with torch.device("meta"):
            made = DelayedVoice(config, WIDTH)
        assert {tensor.device.type for tensor in made.state_dict().values()} == {"meta"}
        assert made.state_dict().keys() == voice(positions=positions, fusion=fusion).state_dict().keys()


def test_a_decoder_of_codes_alone_has_no_weights_for_language() -> None:
    names = voice(fusion="codes").state_dict().keys()
    assert not [name for name in names if name.startswith(("state", "embed", "silence"))]


@torch.no_grad()
def test_who_starts_after_a_change_of_weights_speaks_with_the_new_ones() -> None:
    made, text = voice(), script(1, 4)
    delayed = columns(made, 1, 5)
    before = stepped(made, text, delayed)
    twin = copy.deepcopy(made)
    made.heads.weight.mul_(2)
    made.blocks[0].query.weight.add_(0.1)
    assert_same_scores(stepped(made, text, delayed), made.logits(text, delayed), 1e-5)
    assert_same_scores(stepped(twin, text, delayed), before, 0)
    assert_same_scores(stepped(twin.bfloat16().float(), text, delayed), twin.logits(text, delayed), 1e-5)
    twin.load_state_dict(made.state_dict())
    assert_same_scores(stepped(twin, text, delayed), made.logits(text, delayed), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 16), (512, 640), (96, 512)])
def test_a_matrix_in_its_fastest_form_is_the_same_matrix(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).mul(shape[1] ** -0.5).to(dtype)
    tolerance = {"atol": 2e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
    for rows in (1, 3, 8):
        x, other = (torch.randn(rows, n, generator=generator).to(dtype) for n in (shape[1], shape[0]))
        plain = nn.functional.linear(x, weight)
        matrix = dense(weight)
        assert_close(matrix(x), plain, **tolerance)
        assert_close(matrix.gelu(x), nn.functional.gelu(plain), **tolerance)
        assert_close(matrix.plus(x, other), plain + other, **tolerance)


@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([1e-6, 0.02, 30.0]))
def test_int8_moves_no_weight_by_more_than_a_253rd_of_the_largest_in_its_row(
    rows: int, width: int, size: float
) -> None:
    weight = torch.randn(rows, width) * size * torch.rand(rows, 1)
    rounded, scales = quantise(weight)
    moved = (rounded.float() * scales.float()[:, None] - weight).abs()
    assert (moved <= weight.abs().amax(1, keepdim=True) / 253).all()
    assert torch.equal(quantise(torch.zeros(2, 3))[0], torch.zeros(2, 3, dtype=torch.int8))


@given(st.integers(1, 5), st.integers(1, 50), st.integers(1, 80))
def test_an_int8_product_is_within_its_bound(rows: int, outputs: int, inputs: int) -> None:
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs) * 10 ** torch.randint(-3, 4, (rows, 1))
    said, exact = int8(weight)(x), x @ weight.T
    bound = x.abs().sum(1, keepdim=True) * weight.abs().amax(1) / 253
    bound += x.abs().amax(1, keepdim=True) * weight.abs().sum(1) / 15_000
    assert ((said - exact).abs() <= bound).all()
    alone = torch.cat([int8(weight)(row[None]) for row in x])
    assert torch.equal(said, alone), "a row is the same whoever stands beside it"
    assert torch.equal(int8(weight)(x * 0), exact * 0)


@pytest.mark.parametrize("changes", [{}, MUSICGEN])
@torch.no_grad()
def test_an_int8_voice_scores_nearly_as_its_own_weights_do(changes: dict[str, str]) -> None:
    made = voice(**changes)
    text, delayed = script(2, 4), columns(made, 2, 7)
    exact, rounded = made.logits(text, delayed), stepped(made.quantised(), text, delayed)
    allowed = rounded.isfinite()
    wrong = (rounded - exact[:, : rounded.shape[1]])[allowed]
    assert 0 < wrong.square().mean().sqrt() <= 0.05 * exact[exact.isfinite()].std()


@torch.no_grad()
def test_an_int8_voice_speaks_to_its_end() -> None:
    made = voice().quantised()
    assert isinstance(made, Int8Voice)
    text, state = script(1, 5), made.start(1)
    made.hear(state, 0, text.states[0], text.embeds[0], text.letters[0])
    made.end(state, 0)
    said = []
    while made.ready(state, 0) and len(said) < 500:
        said.append(made.step(state, [0])[0])
    assert made.frames(state, 0) >= sum(made.frames_for(n) for n in (text.letters[0] > 0).sum(-1).tolist()[:-1])


def test_int8_weights_off_the_cpu_are_refused_by_name() -> None:
    with pytest.raises(BadConfig, match=r"int8 voice weights.*CPU.*meta"):
        int8(torch.zeros(4, 4, device="meta"))


@torch.no_grad()
def test_with_one_book_a_reply_has_as_many_steps_as_frames() -> None:
    made = voice(books=1)
    text, state = script(1, 5), made.start(1)
    made.hear(state, 0, text.states[0], text.embeds[0], text.letters[0])
    made.end(state, 0)
    column = torch.tensor([[3]])
    for step in range(4):
        assert made.frames(state, 0) == step and not made.is_done(state, 0)
        made.scores(state, [0])
        made.take(state, [0], column)
    made.scores(state, [0])
    made.take(state, [0], torch.tensor([[made.eos]]))
    assert made.is_done(state, 0) and made.frames(state, 0) == 4
