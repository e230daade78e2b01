"""Prepared speech holds what the model and the codec say, nothing twice and nothing lost, and fits one model alone."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import RATE_HZ, spelled, tiny_model, tiny_picture, tiny_recipe, tiny_sound, tiny_tokenizer

from nexus.data.chat import render, task_turns
from nexus.data.collate import collate
from nexus.data.prepared import FRAME_GRAIN, Line, Prepared, SpeechBatches, speech_batch
from nexus.errors import BadCheckpoint, BadConfig, BadRecord
from nexus.media import write_wav
from nexus.model.folder import load_model, save_model
from nexus.progress import Progress
from nexus.recipe import StageConfig
from nexus.train.loop import Pace, fit
from nexus.train.parallel import Ranks
from nexus.train.prepare import Outcome, Sizes, open_prepared, prepare, prepare_file
from nexus.train.run import train
from nexus.train.stage import freeze
from nexus.train.voice import VoiceAlone, load_voice
from nexus.types import Audio, Sample, Text, Turn

SMALL = Sizes(rows_per_shard=4, rows_per_batch=2)
WORDS = "what is two plus three five seven red circle blue square".split()


@dataclass
class Listed:
    """Conversations in memory; where an error stands in a row's place, asking for the row raises it."""

    rows: list[Sample | Exception]
    fingerprint: str = "0123456789abcdef"

    def where(self, row: int) -> str:
        return f"row {row}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        found = self.rows[row]
        if isinstance(found, Exception):
            raise found
        return found


def talks(count: int) -> Listed:
    """Spoken answers to spoken questions, and sentences read aloud, of many lengths."""
    rows: list[Sample | Exception] = []
    for number in range(count):
        text = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(1 + number % 5))
        said = tiny_sound(0.3 + 0.07 * (number % 7), seed=number)
        if number % 3:
            rows.append(
                Sample(f"row {number}", "s2s", task_turns("s2s", sound=tiny_sound(0.5), text=text, speech=said))
            )
        else:
            rows.append(Sample(f"row {number}", "tts", task_turns("tts", text=text, speech=said)))
    return Listed(rows)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path / "model")


def saved(folder: Path, seed: int = 0, *overrides: str) -> Path:
    save_model(folder, tiny_model(seed, *overrides), {})
    tiny_tokenizer().save(folder / "tokenizer.json")
    return folder


def test_a_line_holds_the_states_embeddings_letters_and_codes_of_what_is_said(model: Path, tmp_path: Path) -> None:
    rows = talks(9)
    outcome = prepare(model, rows, tmp_path / "out", dtype="float32", sizes=SMALL)
    assert outcome == Outcome(whole=True, lines=9, rejected=0, shards_made=3, shards_found=0)
    lines, whole = open_prepared(tmp_path / "out", model), load_model(model)
    assert len(lines) == 9 and lines.frames.tolist() == [lines[i].codes.shape[1] for i in range(9)]
    for number in range(9):
        sample = rows[number]
        row = render(sample, tiny_tokenizer(), whole.config)
        with torch.no_grad():
            states = whole.spoken_states(collate([row], tiny_tokenizer().pad, whole.config), [row.spoken])[0]
            embeds = whole.language.embed(torch.tensor([row.tokens[at] for at in row.spoken]))
        answer = sample.turns[-1].parts[-1]
        assert isinstance(answer, Audio) and answer.samples is not None and whole.codec is not None
        line = lines[number]
        assert torch.allclose(line.states, states, atol=1e-5)
        assert torch.equal(line.embeds, embeds)
        assert line.letters.tolist() == [tiny_tokenizer().letters[row.tokens[at]].tolist() for at in row.spoken]
        assert torch.equal(line.codes, whole.codec.encode(torch.from_numpy(answer.samples)[None, None])[0])
        assert lines.seconds[number] == pytest.approx(len(answer.samples) / RATE_HZ, abs=0.1)


def test_every_spoken_turn_of_a_conversation_is_a_line_of_its_own_words(model: Path, tmp_path: Path) -> None:
    turns = (
        Turn("user", (Text("two"), tiny_picture())),
        Turn("assistant", (Text("red circle"), tiny_sound(0.4, 1))),
        Turn("user", (Text("where"),)),
        Turn("assistant", (Text("left"),)),
        Turn("user", (Text("blue square", aloud=True),)),
        Turn("assistant", (tiny_sound(0.5, 2),)),
        Turn("user", (Text("plus", aloud=True),)),
        Turn("assistant", (Text("seven five two"), tiny_sound(0.6, 3))),
    )
    prepare(model, Listed([Sample("talk", "s2s", turns)]), tmp_path / "out", sizes=SMALL)
    lines = open_prepared(tmp_path / "out", model)
    tokenizer = tiny_tokenizer()
    expected = [tokenizer.encode(text) for text in ("red circle", "blue square", "seven five two")]
    assert [lines[i].letters.tolist() for i in range(len(lines))] == [
        [tokenizer.letters[token].tolist() for token in tokens] for tokens in expected
    ]


def test_what_nothing_is_learned_from_is_listed_with_its_reason_and_the_rest_is_kept(
    model: Path, tmp_path: Path
) -> None:
    def answered(*parts: Text | Audio) -> Sample:
        return Sample("x", "s2s", (Turn("user", (Text("two"),)), Turn("assistant", parts)))

    rows = talks(1)
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF....WAVE")
    rows.rows += [
        answered(Text("red")),
        answered(Text("red"), tiny_sound(6.5)),
        answered(tiny_sound()),
        answered(Text("red"), Audio(path=broken)),
        BadRecord("rows.jsonl:6: no JSON"),
        answered(Text("red"), Audio(samples=np.full(8000, np.nan, np.float32), rate_hz=RATE_HZ)),
        answered(Text("red " * 1100), tiny_sound()),
        answered(Text("red"), tiny_sound(), tiny_sound()),
    ]
    outcome = prepare(model, rows, tmp_path / "out", sizes=SMALL)
    assert (outcome.lines, outcome.rejected) == (1, 8)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    reasons = {int(reject["where"].removeprefix("row ")): reject["reason"] for reject in rejects}
    assert set(reasons) == set(range(1, 9))
    expected = [
        "no spoken answer",
        "limit",
        "no words",
        "broken.wav",
        "rows.jsonl:6: no JSON",
        "not finite",
        "positions",
        "2 sounds",
    ]
    for row, reason in enumerate(expected, 1):
        assert reason in reasons[row], (row, reasons[row])
        assert "\n" not in reasons[row]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_leaves_the_same_folder(model: Path, tmp_path: Path, world: int) -> None:
    rows = talks(14)
    prepare(model, rows, tmp_path / "alone", sizes=SMALL)
    outcomes = [prepare(model, rows, tmp_path / "out", sizes=SMALL, rank=rank, world=world) for rank in range(world)]
    assert [outcome.whole for outcome in outcomes] == [False] * (world - 1) + [True]
    assert sum(outcome.shards_made for outcome in outcomes) == 4
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_command_again_does_nothing_and_a_lost_shard_is_made_again_alone(model: Path, tmp_path: Path) -> None:
    rows, told = talks(10), list[int]()
    prepare(model, rows, tmp_path / "out", sizes=SMALL)
    before = contents(tmp_path / "out")
    again = prepare(model, rows, tmp_path / "out", sizes=SMALL, tell=told.append)
    assert (again.shards_made, again.shards_found, told) == (0, 3, [10])
    (tmp_path / "out" / "shard-000001.safetensors").write_bytes(before["shard-000001.safetensors"][:-40])
    (tmp_path / "out" / "index.json").unlink()
    repaired = prepare(model, rows, tmp_path / "out", sizes=SMALL)
    assert (repaired.shards_made, repaired.shards_found) == (1, 2)
    assert contents(tmp_path / "out") == before


def test_a_folder_begun_with_other_data_another_model_or_another_type_is_refused_by_name(
    model: Path, tmp_path: Path
) -> None:
    rows = talks(4)
    prepare(model, rows, tmp_path / "out", sizes=SMALL)
    with pytest.raises(BadConfig, match=r"different: data.fingerprint \(there 0123456789abcdef, now ffff\); give"):
        prepare(model, Listed(rows.rows, "ffff"), tmp_path / "out", sizes=SMALL)
    with pytest.raises(BadConfig, match=r"dtype \(there bfloat16, now float32\)"):
        prepare(model, rows, tmp_path / "out", dtype="float32", sizes=SMALL)
    with pytest.raises(BadConfig, match=r"model.language \(there \w{16}, now \w{16}\)"):
        prepare(saved(tmp_path / "other", seed=1), rows, tmp_path / "out", sizes=SMALL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(BadConfig, match=r"full holds notes.txt and no plan.json, expected a new folder"):
        prepare(model, rows, tmp_path / "full", sizes=SMALL)


def test_a_model_without_a_voice_and_data_without_rows_are_refused(model: Path, tmp_path: Path) -> None:
    silent = saved(tmp_path / "silent", 0, "model.voice=null", "model.codec=null")
    with pytest.raises(BadConfig, match="no voice"):
        prepare(silent, talks(4), tmp_path / "out")
    with pytest.raises(BadConfig, match="hold no row"):
        prepare(model, Listed([]), tmp_path / "out")


@pytest.mark.parametrize("part", ["language", "vision", "hearing", "codec", "tokenizer"])
def test_training_refuses_another_model_by_both_fingerprints_but_not_another_voice(
    model: Path, tmp_path: Path, part: str
) -> None:
    prepare(model, talks(4), tmp_path / "out", sizes=SMALL)
    retrained = tmp_path / "retrained"
    shutil.copytree(model, retrained)
    weights = load_file(retrained / "model.safetensors")
    weights["voice.norm.weight"] += 1.0
    save_file(weights, retrained / "model.safetensors", {"format": "pt"})
    assert len(open_prepared(tmp_path / "out", retrained)) == 4
    if part == "tokenizer":
        tiny_tokenizer(uncased=False).save(retrained / "tokenizer.json")
    else:
        name = next(name for name in weights if name.startswith(f"{part}.") and weights[name].is_floating_point())
        weights[name].view(-1)[0] += 1.0
        save_file(weights, retrained / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadConfig, match=rf"prepared with {part} \w{{16}}, \S+ has {part} \w{{16}}; prepare anew"):
        open_prepared(tmp_path / "out", retrained)


def test_how_the_weights_are_cut_into_files_is_no_other_model(model: Path, tmp_path: Path) -> None:
    prepare(model, talks(4), tmp_path / "out", sizes=SMALL)
    save_model(tmp_path / "cut", load_model(model), {}, max_shard_bytes=200_000)
    shutil.copy(model / "tokenizer.json", tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    assert len(open_prepared(tmp_path / "out", tmp_path / "cut")) == 4


def test_a_folder_that_is_unfinished_or_damaged_is_refused(model: Path, tmp_path: Path) -> None:
    prepare(model, talks(8), tmp_path / "out", sizes=SMALL, rank=0, world=2)
    with pytest.raises(BadConfig, match=r"holds no index.json, expected a folder that nexus prepare has finished"):
        Prepared(tmp_path / "out")
    prepare(model, talks(8), tmp_path / "out", sizes=SMALL, rank=1, world=2)
    (tmp_path / "out" / "shard-000000.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(BadCheckpoint, match=r"shard-000000.safetensors: damaged"):
        Prepared(tmp_path / "out")[0]
    (tmp_path / "out" / "shard-000000.safetensors").unlink()
    with pytest.raises(BadConfig, match=r"shard-000000\.safetensors is missing"):
        Prepared(tmp_path / "out")


def test_a_file_is_prepared_with_its_bad_lines_named_by_their_number(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes as torchrun starts them, one after the other."""
    data = tmp_path / "rows.jsonl"
    write_wav(tmp_path / "two.wav", tiny_sound(0.5).samples, RATE_HZ)
    asked = {"role": "user", "content": "two"}
    said = {"role": "assistant", "content": [{"type": "text", "text": "red"}, {"type": "audio", "audio": "two.wav"}]}
    lines = [
        json.dumps({"messages": [asked, said]}),
        "{",
        "",
        json.dumps({"messages": [asked, said | {"content": "x"}]}),
    ]
    data.write_text("\n".join([*lines, *lines[:1] * 130]) + "\n")
    stream = io.StringIO()
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        with Progress(stream) as progress:
            outcome = prepare_file(model, data, tmp_path / "out", dtype="float32", device="cpu", progress=progress)
    assert outcome == Outcome(whole=True, lines=131, rejected=2, shards_made=1, shards_found=0)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["where"] for reject in rejects] == [f"{data}:2", f"{data}:4"]
    assert "131 spoken answers, 2 rejected" in stream.getvalue() and "those of other ranks" in stream.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("shards")
    prepare(saved(folder / "model"), talks(23), folder / "out", sizes=SMALL)
    return open_prepared(folder / "out", folder / "model")


@given(st.integers(1, 4), st.sampled_from([0.8, 1.5, 4.0, 100.0]), st.integers(0, 3))
def test_over_an_epoch_every_line_is_seen_once_by_some_rank_within_the_budget(
    shards: Prepared, world: int, seconds: float, epoch: int
) -> None:
    ranks = [SpeechBatches(shards, seconds, 5, rank=rank, world=world) for rank in range(world)]
    count = SpeechBatches(shards, seconds, 5).batches_per_epoch
    assert all(rank.batches_per_epoch == -(-count // world) for rank in ranks)
    batches = [ranks[place % world].chosen(place // world) for place in range(epoch * count, (epoch + 1) * count)]
    assert Counter(number for batch in batches for number in batch) == Counter(range(len(shards)))
    for batch in batches:
        assert len(batch) * shards.seconds[batch].max() <= seconds + 1e-6
    assert 0 <= ranks[0].padding < 0.5


def test_a_step_is_a_function_of_its_number_and_shows_the_mistakes_it_is_asked_for(shards: Prepared) -> None:
    forwards = SpeechBatches(shards, 2.0, 1, 0.2, 0.1)
    backwards = pickle.loads(pickle.dumps(forwards))  # as it is sent to processes that prepare batches
    assert backwards.fingerprint == forwards.fingerprint != SpeechBatches(shards, 2.0, 2, 0.2, 0.1).fingerprint
    steps = range(2 * forwards.batches_per_epoch)
    seen = {step: forwards.at(step) for step in steps}
    wrong = 0.0
    for step in reversed(steps):
        batch, again = seen[step], backwards.at(step)
        assert torch.equal(batch.codes, again.codes) and torch.equal(batch.script.states, again.script.states)
        assert batch.previous is not None and again.previous is not None
        assert torch.equal(batch.previous, again.previous)
        wrong += float((batch.previous != batch.codes).float().mean()) / len(steps)
    assert 0.1 < wrong < 0.35
    assert SpeechBatches(shards, 2.0, 1).at(0).previous is None
    assert [SpeechBatches(shards, 2.0, 2).chosen(n) for n in steps] != [forwards.chosen(n) for n in steps]


def test_a_line_longer_than_the_budget_is_refused_by_its_number(shards: Prepared) -> None:
    with pytest.raises(BadConfig, match=r"line \d+ has 0.\d s, a batch may hold 0.5 s .*; raise it"):
        SpeechBatches(shards, 0.5, 0)


def test_the_voice_alone_learns_what_it_would_learn_inside_the_model(model: Path, tmp_path: Path) -> None:
    prepare(model, talks(12), tmp_path / "out", sizes=SMALL)
    stage = tiny_recipe().stage("speak")
    batches = SpeechBatches(open_prepared(tmp_path / "out", model), 4.0, 0, stage.wrong_codes, stage.wrong_frames)
    whole, alone = load_model(model), load_voice(model)
    voice = sum(p.numel() for p in whole.voice.parameters())  # type: ignore[union-attr]
    assert sum(p.numel() for p in alone.parameters()) == voice < 0.5 * sum(p.numel() for p in whole.parameters())
    for trained in (whole, alone):
        parameters = freeze(trained, stage.trainable)
        fit(
            parameters,
            stage.optim,
            lambda step, trained=trained: {"loss": trained(batches.at(step))["speech"]},  # type: ignore[misc]
            Pace(1.0, 1, steps=4),
            Quiet(),
            bf16=False,
        )
    learned = {name: tensor for name, tensor in whole.state_dict().items() if name.startswith("voice.")}
    assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in learned.items())
    assert not torch.equal(learned["voice.norm.weight"], load_file(model / "model.safetensors")["voice.norm.weight"])


class Quiet:
    total: int | None = None

    def advance(self, n: int = 1, **values: float) -> None:
        pass


def test_the_last_stage_trains_from_a_prepared_folder_and_leaves_a_whole_model(model: Path, tmp_path: Path) -> None:
    prepare(model, talks(12), tmp_path / "prepared", sizes=SMALL)
    lines = open_prepared(tmp_path / "prepared", model)

    def feed(stage: StageConfig, ranks: Ranks) -> SpeechBatches:
        return SpeechBatches(lines, 4.0, 0, stage.wrong_codes, stage.wrong_frames, ranks.rank, ranks.world)

    recipe = tiny_recipe("stages.speak.steps=3", "engine.log=[]", "engine.threads=1")
    record = train(recipe, model, tmp_path / "out", feed, stages=["speak"])
    assert record["stages"]["speak"]["steps"] == 3
    before, after = load_model(model).state_dict(), load_model(tmp_path / "out" / "model").state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("voice.") for name in moved)
    assert len(open_prepared(tmp_path / "prepared", tmp_path / "out" / "model")) == 12


def test_no_language_model_is_made_to_train_the_voice(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every module that is made from the first look at the folders to the first gradient is one of the voice's."""
    prepare(model, talks(8), tmp_path / "out", sizes=SMALL)
    made: list[str] = []
    original = torch.nn.Module.__init__

    def counted(self: torch.nn.Module, *arguments: object, **options: object) -> None:
        made.append(type(self).__name__)
        original(self, *arguments, **options)

    monkeypatch.setattr(torch.nn.Module, "__init__", counted)
    batches = SpeechBatches(open_prepared(tmp_path / "out", model), 4.0, 0)
    alone = load_voice(model)
    alone(batches.at(0))["speech"].backward()
    assert sorted(set(made)) == sorted({type(module).__name__ for module in alone.modules()})
    assert len(made) == len(list(alone.modules()))


def test_a_voice_is_needed_to_train_one(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no voice to train"):
        VoiceAlone(tiny_recipe("model.voice=null", "model.codec=null").model)


def test_a_batch_of_lines_is_padded_behind_its_end() -> None:
    short = Line(torch.ones(1, 4), torch.ones(1, 4), spelled(torch.ones(1)), torch.ones(8, 2, dtype=torch.long))
    long = Line(torch.ones(3, 4), torch.ones(3, 4), spelled(torch.ones(3)), torch.ones(8, 5, dtype=torch.long))
    batch = speech_batch([short, long])
    assert batch.script.lengths.tolist() == [1, 3] and batch.lengths.tolist() == [2, 5]
    assert batch.script.states.shape[1] == batch.script.letters.shape[1] == batch.codes.shape[2] == FRAME_GRAIN
    assert batch.script.states[0].sum(-1).tolist() == [4, *[0] * 7] and batch.codes[0, 3].tolist() == [1, 1, *[0] * 6]


@pytest.mark.slow
def test_a_killed_run_goes_on_behind_its_last_whole_shard(model: Path, tmp_path: Path) -> None:
    """Killed three times with -9 at arbitrary moments; what is left is what an undisturbed run leaves."""
    out, rows = tmp_path / "out", 160
    ways = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    command = [sys.executable, __file__, str(model), str(out), str(rows)]
    seen = 0
    for _ in range(3):
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ways})
        while process.poll() is None and len(list(out.glob("shard-*.safetensors"))) <= seen + 1:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen = len(list(out.glob("shard-*.safetensors")))
        assert seen < rows // SMALL.rows_per_shard, "it was too fast to be killed; give it more rows"
        assert not (out / "index.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.safetensors")}
    outcome = prepare(model, talks(rows), out, sizes=SMALL)
    assert outcome.whole and outcome.lines == rows and outcome.shards_found == seen
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    prepare(model, talks(rows), tmp_path / "alone", sizes=SMALL)
    assert contents(out) == contents(tmp_path / "alone")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), talks(int(sys.argv[3])), Path(sys.argv[2]), sizes=SMALL)
