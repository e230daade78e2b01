"""The whole model: splicing, one batch learned by heart, folders that move, folders that are damaged."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_film, tiny_model, tiny_picture, tiny_recipe, tiny_sound, tiny_tokenizer
from torch import Tensor

from nexus.data.chat import Rendered, render, task_turns
from nexus.data.collate import collate
from nexus.errors import BadCheckpoint, BadConfig, Misaligned, NexusError
from nexus.model.folder import load_model, read_config, save_model
from nexus.model.omni import OmniModel, splice
from nexus.types import Encoded, Script, Span, SpeechBatch, Text, Turn

TOKENIZER = tiny_tokenizer()
SPECS = tiny_recipe().model
ANSWERS = ["two red", "blue circle please", "seven"]


def ask(*parts: object, reply: str = "") -> tuple[Turn, ...]:
    turns = (Turn("user", parts), Turn("assistant", (Text(reply),)))  # type: ignore[arg-type]
    return turns if reply else turns[:1]


def rows_of(talks: Sequence[Sequence[Turn]], answer: bool = False) -> list[Rendered]:
    return [render(talk, TOKENIZER, SPECS, answer) for talk in talks]


@torch.no_grad()
def written(model: OmniModel, talks: Sequence[Sequence[Turn]], max_tokens: int = 12) -> list[str]:
    """Greedy answers to the questions of conversations."""
    batch = collate(rows_of([talk[:-1] for talk in talks], answer=True), TOKENIZER.pad, model.config, "left")
    tokens = torch.stack([s.tokens for s in model.write(batch, TOKENIZER.stops, max_tokens, TOKENIZER.size)], dim=1)
    return [TOKENIZER.decode([t for t in row if t not in TOKENIZER.stops]) for row in tokens.tolist()]


def learn(model: OmniModel, loss: Callable[[], Tensor], steps: int, rate: float = 6e-3) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10, (steps - step) / (steps / 3))
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(value.detach())


SOUNDS = [tiny_sound(seconds, seed) for seed, seconds in enumerate((1.0, 1.6, 0.8))]
TASKS = {
    "asr": [task_turns("asr", sound=s, text=t) for s, t in zip(SOUNDS, ANSWERS, strict=True)],
    "chat": [task_turns("chat", sound=s, text=t) for s, t in zip(SOUNDS, ANSWERS, strict=True)],
    "picture": [ask(tiny_picture(seed=seed), Text("what is"), reply=t) for seed, t in enumerate(ANSWERS)],
}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_one_batch_is_learned_to_exact_answers(task: str) -> None:
    model = tiny_model()
    batch = collate(rows_of(TASKS[task]), TOKENIZER.pad, SPECS)
    learn(model.train(), lambda: model(batch)["text"], 90)
    assert written(model.eval(), TASKS[task]) == ANSWERS
    # The answer comes from the medium: with the media exchanged the answers go with them.
    turned = [
        (Turn("user", (TASKS[task][i - 1][0].parts[0], *talk[0].parts[1:])), talk[1])
        for i, talk in enumerate(TASKS[task])
    ]
    assert written(model, turned) == [ANSWERS[i - 1] for i in range(3)]


def speech_batch(model: OmniModel, texts: Sequence[str], codes: Sequence[Tensor]) -> SpeechBatch:
    rows = rows_of([task_turns("tts", text=text) for text in texts])
    tokens = [torch.tensor([row.tokens[at] for at in row.spoken]) for row in rows]
    states = model.spoken_states(collate(rows, TOKENIZER.pad, SPECS), [row.spoken for row in rows])

    def pad(tensors: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True)

    script = Script(
        pad(states),
        pad([model.language.embed(t).detach() for t in tokens]),
        pad([torch.from_numpy(TOKENIZER.letters[t.tolist()]).long() for t in tokens]),
        torch.tensor([len(t) for t in tokens]),
    )
    return SpeechBatch(script, pad([c.T for c in codes]).transpose(1, 2), torch.tensor([c.shape[1] for c in codes]))


@torch.no_grad()
def said(model: OmniModel, batch: SpeechBatch) -> tuple[list[Tensor], list[Tensor]]:
    """Codes and sound of every row, spoken greedily."""
    rows = len(batch.script.lengths)
    speaker = model.speaker(rows)
    for row, count in enumerate(batch.script.lengths.tolist()):
        script = batch.script
        speaker.say(row, script.states[row, :count], script.embeds[row, :count], script.letters[row, :count])
        speaker.end(row)
    while speaker.step():
        pass
    return [speaker.codes(row) for row in range(rows)], [speaker.sound(row) for row in range(rows)]


def test_one_batch_of_speech_is_learned_to_the_exact_codes() -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(4)
    codes = [torch.randint(16, (8, frames), generator=generator) for frames in (12, 27)]
    batch = speech_batch(model, ["two red", "blue circle please"], codes)
    learn(model.train(), lambda: model(batch)["speech"], 150)
    heard, sounds = said(model.eval(), batch)
    assert [c.tolist() for c in heard] == [c.tolist() for c in codes]
    assert model.codec is not None
    for row, sound in enumerate(sounds):
        assert sound.shape == (codes[row].shape[1] * model.codec.samples_per_frame,)
        assert torch.allclose(sound, model.codec.decode(codes[row][None])[0, 0], atol=1e-5)


def test_speech_streamed_frame_by_frame_is_the_speech_said_at_once() -> None:
    model = tiny_model()
    batch = speech_batch(model, ["two red circle"], [torch.zeros(8, 1, dtype=torch.long)])
    _, whole = said(model, batch)
    speaker, script = model.speaker(1), batch.script
    pieces = []
    for token in range(int(script.lengths[0])):
        here = slice(token, token + 1)
        speaker.say(0, script.states[0, here], script.embeds[0, here], script.letters[0, here])
        while speaker.step():
            pieces.append(speaker.sound(0))
    assert sum(map(len, pieces)) > 0, "sound leaves before the text has ended"
    speaker.end(0)
    while speaker.step():
        pieces.append(speaker.sound(0))
    assert torch.allclose(torch.cat(pieces), whole[0], atol=1e-5)


def test_the_loss_of_a_row_is_that_of_its_labelled_words_each_predicted_from_the_one_before() -> None:
    model, row = tiny_model(), rows_of(TASKS["asr"])[0]
    batch = collate([row], TOKENIZER.pad, SPECS)
    at = torch.tensor([place for place, label in enumerate(row.labels) if label >= 0])
    scores = model.language.logits(model.hidden(batch))[0, at - 1]
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor(row.tokens)[at])
    torch.testing.assert_close(model(batch)["text"], expected)


def test_answers_in_a_batch_are_those_given_alone() -> None:
    model = tiny_model(3)
    talks = [
        ask(tiny_sound(2.0), reply="x"),
        ask(Text("say two"), reply="x"),
        ask(tiny_film(), tiny_sound(), reply="x"),
    ]
    assert written(model, talks) == [written(model, [talk])[0] for talk in talks]


def test_splicing_refuses_what_does_not_fit_and_names_both_counts() -> None:
    embeds, media = torch.zeros(1, 9, 4), Encoded(torch.ones(5, 4), [3, 2])
    spans = [Span("audio", 0, 1, 3, 0), Span("audio", 0, 5, 2, 1)]
    spliced = splice(embeds, media, spans, "audio")
    assert spliced[0, :, 0].tolist() == [0, 1, 1, 1, 0, 1, 1, 0, 0]
    assert not embeds.any()
    wrong = [spans[0], Span("audio", 0, 5, 4, 1)]
    with pytest.raises(Misaligned, match="audio item 1: the prompt holds 4 placeholders, the encoder produced 2"):
        splice(embeds, media, wrong, "audio")
    with pytest.raises(Misaligned, match="1 spans, the encoder got 2 items"):
        splice(embeds, media, spans[:1], "audio")


def test_a_model_folder_moves_and_answers_the_same(tmp_path: Path) -> None:
    model = tiny_model(5)
    talks = [ask(tiny_sound(1.1), tiny_picture(), Text("what is"), reply="x")]
    speech = speech_batch(model, ["two red circle"], [torch.zeros(8, 1, dtype=torch.long)])
    save_model(tmp_path / "here", model, {"note": "mine"})
    (tmp_path / "here").rename(tmp_path / "there")
    loaded = load_model(tmp_path / "there")
    assert read_config(tmp_path / "there") == (model.config, {"note": "mine"})
    assert written(loaded, talks) == written(model, talks) and not loaded.training
    for mine, theirs in zip(said(model, speech), said(loaded, speech), strict=True):
        assert torch.equal(mine[0], theirs[0]) and mine[0].numel() > 0
    weights = loaded.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


Weights = dict[str, Tensor]
NORM = "language.backbone.norm.weight"


def edit_weights(change: Callable[[Weights], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


def edit_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_text())
        change(tree)
        (folder / "config.json").write_text(json.dumps(tree))

    return edit


def cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "truncated": (cut, "damaged or no safetensors file"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or no safetensors file"),
    "other file": (lambda f: (f / "model.safetensors").write_text("hello" * 99), "damaged or no safetensors file"),
    "missing": (edit_weights(lambda w: w.pop(NORM)), rf"1 missing weights \({NORM}\)"),
    "extra": (edit_weights(lambda w: w.update(more=torch.ones(2))), r"1 unexpected weights \(more\)"),
    "misshapen": (edit_weights(lambda w: w.update({NORM: torch.ones(31)})), rf"{NORM} has shape \[31\].*\[32\]"),
    "nan": (edit_weights(lambda w: w[NORM].fill_(float("nan"))), f"{NORM} holds NaN"),
    "foreign": (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "expected format 'nexus-omni/1'"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "found 'list'"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "is no JSON"),
    "bad key": (edit_config(lambda t: t["model"]["voice"].update(bookz=1)), "model: unknown key 'voice.bookz'"),
    "no model": (edit_config(lambda t: t.pop("model")), "model"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    save_model(tmp_path / "model", tiny_model(), {})
    damage(tmp_path / "model")
    with pytest.raises((BadCheckpoint, BadConfig), match=message) as caught:
        load_model(tmp_path / "model")
    assert "\n" not in str(caught.value) and str(tmp_path / "model") in str(caught.value)


def test_a_missing_folder_and_a_file_in_its_place_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("nothing", "file"):
        with pytest.raises(NexusError, match="no such model folder"):
            load_model(tmp_path / name)


def test_a_model_of_text_alone_works_and_has_no_other_organs(tmp_path: Path) -> None:
    bare = tiny_model(0, *(f"model.{organ}=null" for organ in ("hearing", "vision", "voice", "codec")))
    assert {name.split(".")[0] for name in bare.state_dict()} == {"language"}
    talks = [ask(Text("say two"), reply="two red"), ask(Text("say blue circle"), reply="blue")]
    batch = collate([render(talk, TOKENIZER, bare.config) for talk in talks], TOKENIZER.pad, bare.config)
    learn(bare, lambda: bare(batch)["text"], 40)
    save_model(tmp_path / "bare", bare, {})
    assert written(load_model(tmp_path / "bare"), talks) == ["two red", "blue"]
