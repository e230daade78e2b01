"""Training on a user's own rows, in one process: what it leaves, how it goes on, what it refuses."""

import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Rows, model_folder, recipe_for
from safetensors.torch import load_file
from tiny import spelled
from torch import Tensor

import nexus
from nexus.errors import BadConfig, BadRecord, Busy, NexusError
from nexus.model.omni import OmniModel
from nexus.recipe import StageConfig
from nexus.train.loader import Batches
from nexus.train.parallel import Ranks
from nexus.train.run import train
from nexus.types import Audio, Sample, Script, SpeechBatch, Text, Turn


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder that every test begins with."""
    return model_folder(tmp_path_factory.mktemp("init"))


@pytest.fixture(autouse=True, scope="module")
def one_code() -> Iterator[None]:
    """The code does not change while these tests run, whoever edits it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nexus.train.run.code_digest", lambda: "as it is")
        yield


@dataclass(frozen=True)
class Breaking(Rows):
    """Rows that fail at step `at_step`, once `mended` does not exist."""

    at_step: int = 13
    mended: Path = Path("nowhere")

    def at(self, step: int) -> list[Sample]:
        if step == self.at_step and not self.mended.exists():
            raise BadRecord("train.jsonl:7: has no turns")
        return super().at(step)


def feed(stage: StageConfig, ranks: Ranks) -> Rows:
    return Rows(("ait", "t"), ranks.rank, ranks.world)


def losses(out: Path, stage: str = "sft") -> list[float]:
    lines = (out / f"{stage}.steps.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def trained(one_code: None, init: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of twenty steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, train(recipe_for(), init, out, feed)


def test_what_a_stage_trains_has_moved_and_everything_else_is_the_same_bit_for_bit(
    init: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    before, after = weights(init), weights(trained[0] / "model")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("hearing.", "vision.", "language.")) for name in moved)
    assert {name.split(".")[0] for name in moved} == {"hearing", "vision", "language"}


def test_the_model_that_is_left_answers_and_says_where_it_comes_from(trained: tuple[Path, dict[str, Any]]) -> None:
    out, record = trained
    responder = nexus.load(out / "model")
    assert list(responder.respond([Turn("user", (Text("what is two"),))], speak=False, max_tokens=3))
    about = json.loads((out / "model" / "config.json").read_text())["about"]
    assert about["recipe"] == {"name": "made for a test"}
    assert [note["stage"] for note in about["trained"]] == ["sft"]
    assert "hearing.*" in (out / "model" / "README.md").read_text()
    stage = record["stages"]["sft"]
    assert (stage["steps"], stage["rows"]) == (20, 60)
    assert stage["tokens"] < stage["padded_tokens"] and 0 < stage["token_padding"] < 1
    assert not (out / "checkpoints").exists() and not (out / "stages").exists()


def test_learning_lowers_the_loss(trained: tuple[Path, dict[str, Any]]) -> None:
    curve = losses(trained[0])
    assert sum(curve[-5:]) < sum(curve[:5]) - 1.0


def test_a_finished_run_is_not_done_again(init: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    out, record = trained
    stamp = (out / "model" / "model.safetensors").stat().st_mtime_ns
    assert train(recipe_for(), init, out, feed) == record
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    init: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    recipe, mended = recipe_for("engine.checkpoint_every_steps=4"), tmp_path / "mended"

    def breaking(stage: StageConfig, ranks: Ranks) -> Batches:
        return Breaking(("ait", "t"), ranks.rank, ranks.world, mended=mended)

    with pytest.raises(BadRecord, match=r"stage sft: batch 13: train.jsonl:7: has no turns; .*step-00000012 is whole"):
        train(recipe, init, tmp_path / "out", breaking)
    assert len(losses(tmp_path / "out")) == 13
    mended.touch()
    train(recipe, init, tmp_path / "out", breaking)
    assert losses(tmp_path / "out") == losses(trained[0])
    left, right = weights(tmp_path / "out" / "model"), weights(trained[0] / "model")
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_workers_prepare_the_same_batches(init: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    train(recipe_for("data.workers=2", "stages.sft.steps=4"), init, tmp_path / "out", feed)
    four = tmp_path / "inline"
    train(recipe_for("stages.sft.steps=4"), init, four, feed)
    assert losses(tmp_path / "out") == losses(four)


def test_micro_batches_give_the_gradient_of_the_whole_batch(init: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Halves(Rows):
        def at(self, step: int) -> list[Sample]:
            rows = Rows(self.kinds).at(step // 2)
            return rows[:1] if step % 2 == 0 else rows[1:]

    train(recipe_for("stages.sft.steps=6"), init, tmp_path / "whole", feed)
    halves = recipe_for("stages.sft.steps=6", "engine.accumulation=2")
    train(halves, init, tmp_path / "halves", lambda stage, ranks: Halves(("ait", "t")))
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), abs=2e-5)


@pytest.mark.parametrize("switch", ["stages.sft.checkpointing=true", "engine.dtype=bfloat16"])
def test_switches_of_the_engine_change_memory_and_bits_but_not_what_is_learned(
    init: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path, switch: str
) -> None:
    train(recipe_for(switch, "stages.sft.steps=5"), init, tmp_path / "out", feed)
    assert losses(tmp_path / "out") == pytest.approx(losses(trained[0])[:5], abs=0.05)
    after = weights(tmp_path / "out" / "model")
    assert {tensor.dtype for tensor in after.values() if tensor.is_floating_point()} == {torch.float32}


def test_stages_follow_each_other_and_each_begins_where_the_one_before_ended(init: Path, tmp_path: Path) -> None:
    two = (
        "stages=[{name: align, trainable: ['hearing.*'], mixture: {asr: 1}, seconds: 0.0, steps: 3},"
        " {name: sft, trainable: ['language.*'], mixture: {chat: 1}, seconds: 0.0, epochs: 0.5}]"
    )
    record = train(recipe_for(two), init, tmp_path / "out", lambda *_: Rows(("a", "a")))
    assert [stage["steps"] for stage in record["stages"].values()] == [3, 5]
    before, after = weights(init), weights(tmp_path / "out" / "model")
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"hearing", "language"}


@dataclass(frozen=True)
class Speech:
    """Prepared speech: random states and codes."""

    fingerprint: str = "speech"
    batches_per_epoch: int = 4

    def at(self, step: int) -> SpeechBatch:
        generator = torch.Generator().manual_seed(step)
        states = torch.randn(2, 3, 32, generator=generator)
        script = Script(states, states, spelled(torch.tensor([[3, 2, 4], [1, 2, 0]])), torch.tensor([3, 2]))
        return SpeechBatch(script, torch.randint(16, (2, 8, 12), generator=generator), torch.tensor([12, 9]))


SPEAK = "stages=[{name: speak, trainable: ['voice.*'], mixture: {tts: 1}, seconds: 0.0, steps: 6}]"


def test_the_voice_learns_with_nothing_else_in_memory(
    init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr("nexus.train.work.load_model", never)
    record = train(recipe_for(SPEAK), init, tmp_path / "out", lambda *_: Speech())
    before, after = weights(init), weights(tmp_path / "out" / "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("voice.")}
    assert record["stages"]["speak"]["rows"] == 12
    nexus.load(tmp_path / "out" / "model")


def test_conversations_for_a_stage_that_trains_the_voice_alone_are_refused(init: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BadConfig, match=r"stage speak: it trains the voice alone, expected prepared speech, .*nexus prepare"
    ):
        train(recipe_for(SPEAK), init, tmp_path / "out", feed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("stages.sft.optim.rate=0.002",), "recipe"),
        (("engine.threads=2",), "threads"),
        (("engine.dtype=bfloat16",), "dtype"),
        (("engine.accumulation=2",), "accumulation"),
    ],
)
def test_a_change_under_a_run_is_refused_by_name(
    init: Path, tmp_path: Path, change: tuple[str, ...], named: str
) -> None:
    out = stopped(init, tmp_path)
    with pytest.raises(BadConfig, match=rf"was begun with another {named} \(there .*, now .*allow-inexact"):
        train(recipe_for("engine.checkpoint_every_steps=4", *change), init, out, feed)
    torch.set_num_threads(1)


def stopped(init: Path, tmp_path: Path) -> Path:
    """The folder of a run that has stopped at step 13, behind the checkpoint of step 12."""
    with pytest.raises(BadRecord):
        train(recipe_for("engine.checkpoint_every_steps=4"), init, tmp_path / "out", lambda *_: Breaking(("ait", "t")))
    return tmp_path / "out"


def test_changed_data_or_code_or_model_under_a_run_is_refused_and_may_be_allowed(
    init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, recipe = stopped(init, tmp_path), recipe_for("engine.checkpoint_every_steps=4")

    def other(stage: StageConfig, ranks: Ranks) -> Rows:
        return Rows(("ait", "t"), ranks.rank, ranks.world, fingerprint="other rows")

    with pytest.raises(BadConfig, match=r"another data \(there rows, now other rows\)"):
        train(recipe, init, out, other)
    with pytest.raises(BadConfig, match="another model"):
        train(recipe, model_folder_with_another_seed(tmp_path), out, feed)
    with monkeypatch.context() as patch:
        patch.setattr("nexus.train.run.code_digest", lambda: "0123")
        with pytest.raises(BadConfig, match=r"another code \(there .*, now 0123\)"):
            train(recipe, init, out, feed)
    assert train(recipe, init, out, other, allow_inexact=True)["stages"]["sft"]["steps"] == 20


def model_folder_with_another_seed(tmp_path: Path) -> Path:
    folder = model_folder(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["about"] = {"recipe": {"name": "another"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_checkpoint(
    init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OmniModel.forward

    def sick(model: OmniModel, batch: Any) -> dict[str, Tensor]:
        sick.calls += 1  # type: ignore[attr-defined]
        found = real(model, batch)
        return {name: loss * (math.nan if sick.calls == 6 else 1.0) for name, loss in found.items()}  # type: ignore[attr-defined]

    sick.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(OmniModel, "forward", sick)
    with pytest.raises(NexusError, match=r"stage sft: loss is nan at step 5.*lower optim.rate.*step-00000004 is whole"):
        train(recipe_for("engine.checkpoint_every_steps=4"), init, tmp_path / "out", feed)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may become larger than this: what a full disk is like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_while_a_checkpoint_is_written_leaves_the_one_before(init: Path, tmp_path: Path) -> None:
    out, recipe = stopped(init, tmp_path), recipe_for("engine.checkpoint_every_steps=4")
    with (
        files_of_at_most(100_000),
        pytest.raises(NexusError, match=r"step-00000016 cannot be written: .*00012 is whole"),
    ):
        train(recipe, init, out, feed)
    assert sorted(path.name for path in (out / "checkpoints" / "sft").iterdir()) == ["step-00000008", "step-00000012"]
    assert train(recipe, init, out, feed)["stages"]["sft"]["steps"] == 20


def test_a_disk_that_is_full_while_the_model_is_written_costs_no_checkpoint(init: Path, tmp_path: Path) -> None:
    out, recipe = stopped(init, tmp_path), recipe_for("engine.checkpoint_every_steps=1000")
    with files_of_at_most(100_000), pytest.raises(NexusError, match=r"sft.part: cannot be written.*make room"):
        train(recipe, init, out, feed)
    assert (out / "checkpoints" / "sft" / "step-00000012").is_dir() and not (out / "model").exists()


def test_a_damaged_checkpoint_is_named_with_what_to_do(init: Path, tmp_path: Path) -> None:
    out = stopped(init, tmp_path)
    (shard,) = (out / "checkpoints" / "sft" / "step-00000012").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(NexusError, match=r"step-00000012: damaged .*remove this folder to go on from the one before"):
        train(recipe_for("engine.checkpoint_every_steps=4"), init, out, feed)


def test_a_folder_of_something_else_or_of_a_running_run_is_refused(init: Path, tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(BadConfig, match="holds something else"):
        train(recipe_for(), init, tmp_path, feed)

    def again(stage: StageConfig, ranks: Ranks) -> Rows:
        train(recipe_for(), init, tmp_path / "out", feed)
        raise AssertionError("a second run took the folder")

    with pytest.raises(Busy, match="in use by another run"):
        train(recipe_for(), init, tmp_path / "out", again)


def test_rows_that_cannot_be_sent_to_workers_are_refused(init: Path, tmp_path: Path) -> None:
    class Local(Rows):
        """A class inside of a function, which no other process can find."""

    with pytest.raises(NexusError, match=r"data.workers: these rows cannot be sent .*set data.workers=0"):
        train(recipe_for("data.workers=1"), init, tmp_path / "out", lambda *_: Local(("t",)))


def test_a_stage_that_does_not_say_how_long_it_takes_is_refused(init: Path, tmp_path: Path) -> None:
    stage = "stages=[{name: sft, trainable: ['language.*'], mixture: {chat: 1}, seconds: 0.0}]"
    with pytest.raises(BadConfig, match=r"stage sft does not say how long.*stages.sft.epochs=1"):
        train(recipe_for(stage), init, tmp_path / "out", feed)


def test_several_processes_are_asked_for_by_the_launcher(init: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"engine.parallel is fsdp, expected several processes.*torchrun"):
        train(recipe_for("engine.parallel=fsdp"), init, tmp_path / "out", feed)


def test_a_row_that_cannot_be_read_is_named(init: Path, tmp_path: Path) -> None:
    class Gone(Rows):
        def at(self, step: int) -> list[Sample]:
            turns = (Turn("user", (Audio(path=tmp_path / "gone.wav"),)), Turn("assistant", (Text("two"),)))
            return [Sample("train.jsonl:3", "asr", turns)]

    with pytest.raises(NexusError, match=r"stage sft: batch 0: row train.jsonl:3: .*gone.wav.*no checkpoint"):
        train(recipe_for(), init, tmp_path / "out", lambda *_: Gone(("t",)))


def test_a_gate_is_asked_before_during_and_after_a_stage_and_may_stop_it(init: Path, tmp_path: Path) -> None:
    class Watchman:
        def __init__(self, patience: int) -> None:
            self.calls: list[Any] = []
            self.patience = patience

        def begin(self, stage: StageConfig, model: OmniModel) -> None:
            self.calls.append(stage.name)

        def due(self, step: int) -> bool:
            return step % 8 == 0

        def check(self, model: OmniModel, step: int) -> None:
            self.calls.append(step)
            if step > self.patience:
                raise NexusError("vision fell")

    patient, strict = Watchman(99), Watchman(10)
    train(recipe_for(), init, tmp_path / "patient", feed, gate=lambda ranks: patient)
    assert patient.calls == ["sft", 8, 16, 20]
    with pytest.raises(NexusError, match="vision fell"):
        train(recipe_for(), init, tmp_path / "strict", feed, gate=lambda ranks: strict)
    assert strict.calls == ["sft", 8, 16] and not (tmp_path / "strict" / "model").exists()


def test_events_for_tensorboard_are_written_where_the_recipe_names_them(init: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(recipe_for("engine.log=[tensorboard]", "stages.sft.steps=2"), init, tmp_path / "out", feed)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out" / "tensorboard" / "sft")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(tmp_path / "out"))
