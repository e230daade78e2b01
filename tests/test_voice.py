"""The voice: the delay pattern, teacher forcing against one step at a time, rows at their own pace."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import spelled, tiny_recipe
from torch import Tensor, nn
from torch.testing import assert_close

from nexus.model.voice.delayed import DelayedVoice, delay, undelay
from nexus.organs import VoiceConfig
from nexus.types import LETTERS, Script

TINY = tiny_recipe().model.voice
assert TINY is not None
BOOKS, SIZE = TINY.books, TINY.book_size
PAD, EOS = SIZE, SIZE + 1
SWITCHES = [
    *product(("clock", "hold", "last"), ("mean9", "half"), ("state", "state+embedding"), (False,)),
    *product(("clock",), ("mean9", "half"), ("state", "state+embedding"), (True,)),
]


def voice(**changes: object) -> DelayedVoice:
    """A voice that listens: with its fresh heads every code would be nearly as good as any other."""
    torch.manual_seed(0)
    assert TINY is not None
    made = DelayedVoice(VoiceConfig.model_validate({**TINY.model_dump(), "spelling": False, **changes}), 32).eval()
    for parameter in (made.start_vector, made.silence, made.heads.weight):
        nn.init.normal_(parameter)
    return made


def script(lengths: list[int], longest: int | None = None, seed: int = 0) -> Script:
    """Random states and embeddings; what stands in the padding differs from row to row and from seed to seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), longest or max(lengths))
    states, embeds = torch.randn(2, *shape, 32, generator=generator)
    letters = spelled(torch.randint(0, 7, shape, generator=generator))
    return Script(states, embeds, letters, torch.tensor(lengths))


def spoken(made: DelayedVoice, text: Script, row: int, steps: int, rows: int = 1) -> Tensor:
    """Delayed columns [K, steps] of one row that is heard whole and ended before its first step."""
    state = made.start(rows)
    tell(made, state, text, row, 0, int(text.lengths[row]))
    made.end(state, 0)
    columns: list[Tensor] = []
    while len(columns) < steps and made.ready(state, 0):
        columns.append(made.step(state, [0])[0])
    return torch.stack(columns, dim=1)


def tell(made: DelayedVoice, state: object, text: Script, row: int, begin: int, end: int, at: int = 0) -> None:
    part = slice(begin, end)
    with torch.no_grad():
        made.hear(state, at, text.states[row, part], text.embeds[row, part], text.letters[row, part])  # type: ignore[arg-type]


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.integers(0, 9))
def test_delaying_and_undelaying_gives_the_codes_back(rows: int, books: int, frames: int, seed: int) -> None:
    codes = torch.randint(SIZE, (rows, books, frames), generator=torch.Generator().manual_seed(seed))
    delayed = delay(codes, torch.full((rows,), frames), PAD, EOS)
    assert delayed.shape == (rows, books, frames + books)
    assert torch.equal(undelay(delayed), codes)


def test_the_layout_is_pads_then_codes_then_one_end_then_pads() -> None:
    codes = torch.arange(2 * 3 * 4).view(2, 3, 4) % SIZE
    delayed = delay(codes, torch.tensor([4, 2]), PAD, EOS)
    assert delayed[0].tolist() == [
        [0, 1, 2, 3, EOS, PAD, PAD],
        [PAD, 4, 5, 6, 7, EOS, PAD],
        [PAD, PAD, 8, 9, 10, 11, EOS],
    ]
    assert delayed[1].tolist() == [
        [12, 13, EOS, PAD, PAD, PAD, PAD],
        [PAD, 0, 1, EOS, PAD, PAD, PAD],
        [PAD, PAD, 4, 5, EOS, PAD, PAD],
    ]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any))
def test_every_book_holds_its_codes_and_one_end(lengths: list[int]) -> None:
    codes = torch.randint(SIZE, (len(lengths), BOOKS, max(lengths)))
    delayed = delay(codes, torch.tensor(lengths), PAD, EOS)
    assert ((delayed == EOS).sum(2) == 1).all()
    assert ((delayed < SIZE).sum(2) == torch.tensor(lengths)[:, None]).all()


@pytest.mark.parametrize(("conditioning", "fusion", "source", "spelling"), SWITCHES)
@torch.no_grad()
def test_one_step_at_a_time_says_what_teacher_forcing_scores_highest(
    conditioning: str, fusion: str, source: str, spelling: bool
) -> None:
    made = voice(conditioning=conditioning, fusion=fusion, source=source, spelling=spelling)
    different = set()
    for seed in range(4):
        text = script([9], seed=seed)
        said = spoken(made, text, 0, steps=30)
        different |= {str(column) for column in said.T.tolist()}
        scores = made.logits(text, said[None])[0]  # [S2, K, C2]
        ends = (said[0] == EOS).nonzero()[:, 0].tolist()
        finish = ends[0] if ends else said.shape[1]
        held = [made.frames_for(count) for count in (text.letters[0] > 0).sum(-1).tolist()]
        words_end = {"clock": sum(held), "hold": len(held), "last": 0}[conditioning]
        for book in range(BOOKS):
            mine = said[book, book : finish + book]
            scored = scores[book : finish + book, book].clone()
            # The first book alone may end, and need not as long as there are words to say.
            scored[: words_end if book == 0 else None, EOS] = float("-inf")
            assert torch.equal(scored.argmax(-1), mine)
        if ends:
            assert int(scores[finish, 0].argmax()) == EOS
    assert len(different) > 20, "a voice that says one thing only proves nothing"


@pytest.mark.parametrize("switch", [{"conditioning": "hold"}, {"fusion": "codes", "source": "state"}])
def test_letters_are_told_under_the_clock_alone(switch: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="spelling needs conditioning clock and a fusion with states"):
        voice(spelling=True, **switch)


@torch.no_grad()
def test_every_switch_changes_what_is_said() -> None:
    names, text = ("conditioning", "fusion", "source", "spelling"), script([4])
    said = {
        switches: spoken(voice(**dict(zip(names, switches, strict=True))), text, 0, 16).tolist()
        for switches in SWITCHES
    }
    assert len({str(columns) for columns in said.values()}) == len(SWITCHES)


@pytest.mark.parametrize("conditioning", ["clock", "hold", "last"])
@torch.no_grad()
def test_rows_at_different_paces_say_what_they_say_alone(conditioning: str) -> None:
    made = voice(conditioning=conditioning)
    text = script([5, 3, 4])
    alone = [spoken(made, text, row, steps=24) for row in range(3)]
    state = made.start(3)
    columns: list[list[Tensor]] = [[], [], []]
    told = [0, 0, 0]
    rng = torch.Generator().manual_seed(3)
    for _ in range(400):
        row = int(torch.randint(3, (), generator=rng))
        if told[row] < int(text.lengths[row]):
            tell(made, state, text, row, told[row], told[row] + 1, at=row)
            told[row] += 1
            if told[row] == int(text.lengths[row]):
                made.end(state, row)
        some = [r for r in range(3) if made.ready(state, r) and torch.rand((), generator=rng) < 0.6]
        if some:
            for r, column in zip(some, made.step(state, some), strict=True):
                columns[r].append(column)
    for row in range(3):
        steps = min(24, alone[row].shape[1])
        assert torch.equal(torch.stack(columns[row][:steps], dim=1), alone[row][:, :steps])


@pytest.mark.parametrize("conditioning", ["clock", "hold"])
@torch.no_grad()
def test_the_voice_never_ends_before_its_text_has(conditioning: str) -> None:
    made = voice(conditioning=conditioning, greedy_books=0, temperature=100.0)  # every code is as likely as the end
    generator = torch.Generator().manual_seed(0)
    state = made.start(1)
    text = script([200])
    tell(made, state, text, 0, 0, 200)
    columns = []
    while made.ready(state, 0):
        columns.append(made.step(state, [0], generator)[0])
        assert not made.is_done(state, 0)
    assert len(columns) > 150 and int(torch.stack(columns)[:, 0].max()) < SIZE
    made.end(state, 0)
    while made.ready(state, 0):
        columns.append(made.step(state, [0], generator)[0])
        assert len(columns) < 2_000
    said = torch.stack(columns, dim=1)
    frames = made.frames(state, 0)
    assert made.is_done(state, 0) and said.shape[1] == frames + BOOKS - 1  # the last book's end need not be waited for
    whole = nn.functional.pad(said, (0, 1), value=PAD)
    whole[-1, -1] = EOS
    assert torch.equal(whole, delay(undelay(whole[None]), torch.tensor([frames]), PAD, EOS)[0])


@torch.no_grad()
def test_without_text_to_come_nothing_is_said_before_the_text_is_there() -> None:
    for conditioning in ("clock", "hold", "last"):
        made = voice(conditioning=conditioning)
        state = made.start(1)
        assert not made.ready(state, 0) and made.frames(state, 0) == 0
        made.end(state, 0)
        assert made.ready(state, 0)  # an empty text may end at once


@given(st.lists(st.integers(0, LETTERS), min_size=1, max_size=6), st.sampled_from([0.4, 1.0, 1.3, 2.15]))
@torch.no_grad()
def test_the_clock_holds_each_token_for_the_frames_it_announces(letters: list[int], rate: float) -> None:
    made = voice(conditioning="clock", frames_per_character=rate)
    torch.manual_seed(1)
    states, embeds = torch.randn(2, 1, len(letters), 32)
    text = Script(states, embeds, spelled(torch.tensor([letters])), torch.tensor([len(letters)]))
    held = [made.frames_for(count) for count in letters]
    line = made.timeline(text, sum(held) + 3)[0]
    _, runs = torch.unique_consecutive(line, dim=0, return_counts=True)
    assert runs.tolist() == [*held, 3]
    assert_close(line[-1], made.silence)


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 9), st.sampled_from(["clock", "hold", "last"]))
@torch.no_grad()
def test_padding_of_words_or_frames_does_not_change_the_loss(
    words: int, more: int, frames: int, conditioning: str
) -> None:
    made = voice(conditioning=conditioning)
    text = script([words])
    padded = script([words], words + more, seed=1)
    for own, wide in ((text.states, padded.states), (text.embeds, padded.embeds), (text.letters, padded.letters)):
        wide[:, :words] = own
    codes = torch.randint(SIZE, (1, BOOKS, frames))
    longer = torch.cat([codes, torch.randint(SIZE, (1, BOOKS, 4))], dim=2)
    alone = made.loss(text, codes, torch.tensor([frames]))
    wide_loss = made.loss(padded, longer, torch.tensor([frames]))
    assert_close(wide_loss["speech"], alone["speech"])
    assert_close(wide_loss["first_book"], alone["first_book"])


@torch.no_grad()
def test_a_row_in_a_batch_is_scored_as_it_is_alone() -> None:
    made = voice()
    text = script([5, 2])
    codes = torch.randint(SIZE, (2, BOOKS, 9))
    lengths = torch.tensor([9, 4])
    together = made.logits(text, delay(codes, lengths, PAD, EOS))
    short = Script(text.states[1:, :2], text.embeds[1:, :2], text.letters[1:, :2], text.lengths[1:])
    alone = made.logits(short, delay(codes[1:, :, :4], lengths[1:], PAD, EOS))
    assert_close(together[1:, : 4 + BOOKS], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_book_weights_weigh_the_books() -> None:
    first_only = voice(book_weights=(1.0, *[0.0] * (BOOKS - 1)))
    losses = first_only.loss(script([3]), torch.randint(SIZE, (1, BOOKS, 5)), torch.tensor([5]))
    assert_close(losses["speech"], losses["first_book"])
