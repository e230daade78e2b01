"""Several real processes that train one model: equal to one process, never waiting for ever, going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import ROOT, finish, model_folder, start
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRAIN = """
import sys
from pathlib import Path
from launch import Rows, recipe_for
import nexus.train.run as run
from nexus.errors import NexusError
run.code_digest = lambda: "as it is"  # others may edit the code while this runs
init, out, kinds, pause = sys.argv[1:5]
if __name__ == "__main__":
    def feed(stage, ranks):
        return Rows(tuple(kinds.split(",")), ranks.rank, ranks.world, pause_seconds=float(pause))
    try:
        run.train(recipe_for(*sys.argv[5:]), Path(init), Path(out), feed)
    except NexusError as error:
        print(f"nexus: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("init"))


def run(world: int, init: Path, out: Path, kinds: str, *overrides: str, pause: float = 0.0) -> list[tuple[int, str]]:
    """Exit codes and standard errors of the ranks of a run."""
    started = start(TRAIN, [str(init), str(out), kinds, str(pause), *overrides], world)
    return [(code, error) for code, _, error in finish(started, 300)]


def steps(out: Path) -> list[dict[str, float]]:
    path = out / "sft.steps.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(out: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 240
    while len(steps(out)) < step:
        assert time.monotonic() < end and all(process.poll() is None for process in processes), [
            process.communicate()[1][-2000:] for process in processes if process.poll() is not None
        ]
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("parallel", "kinds", "overrides"),
    [
        ("fsdp", "t,a", ()),
        ("fsdp", "ti,a", ("stages.sft.checkpointing=true", "engine.accumulation=2", "stages.sft.steps=6")),
        ("fsdp", "t,ia", ("engine.lora={rank: 4}", "stages.sft.steps=6")),
        ("ddp", "t,a", ()),
        ("fsdp", "t,a", ("stages.sft.trainable=['hearing.*']", "stages.sft.steps=6")),
        ("ddp", "t,a", ("stages.sft.trainable=['hearing.*']", "stages.sft.steps=6")),
        ("ddp", "i,a", ("engine.accumulation=2", "stages.sft.steps=6")),
    ],
)
def test_two_ranks_with_different_media_learn_what_one_process_learns_from_the_joined_rows(
    init: Path, tmp_path: Path, parallel: str, kinds: str, overrides: tuple[str, ...]
) -> None:
    assert run(1, init, tmp_path / "one", kinds, *overrides)[0][0] == 0
    both = run(2, init, tmp_path / "two", kinds, f"engine.parallel={parallel}", *overrides)
    assert [code for code, _ in both] == [0, 0], both
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(one) == len(two) and len(one) in (20, 6)
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=2e-4)
        assert right["norm"] == pytest.approx(left["norm"], rel=5e-3)
        assert (right["rows"], right["tokens"]) == (left["rows"], left["tokens"])
    # Before the optimiser's own noise grows: the norm of the very first gradient is the same.
    assert two[0]["norm"] == pytest.approx(one[0]["norm"], rel=1e-5)


GATE = TRAIN.replace(
    "if __name__",
    """
import torch
from launch import sample
from nexus.train.loader import batch_of
from tiny import tiny_tokenizer

class Gate:
    def begin(self, stage, model):
        model.eval()
        batch = batch_of([sample(n, "ait") for n in range(3)], tiny_tokenizer(), model.config)
        with torch.no_grad():  # a part by itself, the whole, and an answer
            print(float(model.hidden(batch).sum()), float(model(batch)["text"]))
            asked = batch_of([sample(0, "t")], tiny_tokenizer(), model.config)
            print(*(int(step.tokens) for step in model.write(asked, (0,), 3, 100)))
    def due(self, step):
        return step == 2
    def check(self, model, step):
        self.begin(None, model)

if __name__""",
).replace("Path(out), feed)", "Path(out), feed, gate=lambda ranks: Gate())")


def test_a_gate_measures_a_model_in_shards_as_it_measures_a_whole_one(init: Path, tmp_path: Path) -> None:
    said = []
    for world, parallel in ((1, "none"), (2, "fsdp")):
        settings = ("stages.sft.steps=4", f"engine.parallel={parallel}")
        done = finish(start(GATE, [str(init), str(tmp_path / parallel), "ti,a", "0", *settings], world), 300)
        assert [code for code, _, _ in done] == [0] * world, done
        said.append([float(number) for number in done[0][1].split()])
    assert len(said[0]) == 3 * (2 + 3)
    assert said[1] == pytest.approx(said[0], rel=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_killed_ranks_with_workers_go_on_bit_for_bit(init: Path, tmp_path: Path, parallel: str) -> None:
    settings = (
        f"engine.parallel={parallel}",
        "data.workers=1",
        "stages.sft.steps=36",
        "engine.checkpoint_every_steps=5",
    )
    assert [code for code, _ in run(2, init, tmp_path / "whole", "ti,a", *settings)] == [0, 0]
    out = tmp_path / "killed"
    started = start(TRAIN, [str(init), str(out), "ti,a", "0.3", *settings], 2)
    wait_for_step(out, 13, started)
    for process in started:
        process.send_signal(signal.SIGKILL)
    finish(started)
    before = len(steps(out))
    assert 13 <= before < 36
    kept = sorted(path.name for path in (out / "checkpoints" / "sft").glob("step-*[0-9]"))
    assert 1 <= len(kept) <= 2 and not (out / "model").exists()
    assert [code for code, _ in run(2, init, out, "ti,a", *settings)] == [0, 0]
    assert [row["loss"] for row in steps(out)] == [row["loss"] for row in steps(tmp_path / "whole")]
    assert 36 - int(kept[-1].removeprefix("step-")) >= 20
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_another_number_of_ranks_is_refused_and_with_leave_goes_on_from_the_same_checkpoint(
    init: Path, tmp_path: Path
) -> None:
    out, settings = tmp_path / "out", ("engine.checkpoint_every_steps=3", "engine.parallel=auto")
    started = start(TRAIN, [str(init), str(out), "t,a", "0.3", *settings], 2)
    wait_for_step(out, 4, started)
    for process in started:
        process.kill()
    finish(started)
    ((code, said),) = run(1, init, out, "t,a", *settings)
    assert code == 2 and "another world (there 2, now 1)" in said and said.count("\n") == 1
    allowing = TRAIN.replace("Path(out), feed)", "Path(out), feed, allow_inexact=True)")
    ((code, _, said),) = finish(start(allowing, [str(init), str(out), "t,a", "0", *settings]), 300)
    assert code == 0, said
    assert len(steps(out)) == 20


def test_a_rank_that_dies_ends_the_other_with_one_line_and_the_checkpoint_is_kept(init: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", ("engine.parallel=fsdp", "engine.checkpoint_every_steps=3")
    started = start(TRAIN, [str(init), str(out), "t,a", "0.3", *settings], 2)
    wait_for_step(out, 5, started)
    begun = time.monotonic()
    started[1].kill()
    (code, _, said), _ = finish(started, 60)
    assert time.monotonic() - begun < 60
    (line,) = [line for line in said.splitlines() if line.startswith("nexus:")]
    assert code == 2 and "rank 0 has lost the others" in line and "step-0000" in line
    assert list((out / "checkpoints" / "sft").glob("step-*[0-9]"))


def test_a_worker_that_dies_is_an_error_and_no_wait(init: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = start(TRAIN, [str(init), str(out), "t", "0.5", "data.workers=1"], 1)
    wait_for_step(out, 2, started)
    children = subprocess.run(["pgrep", "-P", str(started[0].pid)], capture_output=True, text=True).stdout.split()
    for child in children:
        command = Path(f"/proc/{child}/cmdline").read_text()
        if "spawn_main" in command:
            os.kill(int(child), signal.SIGKILL)
    ((code, _, said),) = finish(started, 60)
    assert code == 2 and "a process that prepares batches has died" in said.splitlines()[-1], said


def test_workers_die_with_the_process_that_trains(init: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = start(TRAIN, [str(init), str(out), "t", "0.5", "data.workers=1"], 1)
    wait_for_step(out, 2, started)
    children = subprocess.run(["pgrep", "-P", str(started[0].pid)], capture_output=True, text=True).stdout.split()
    assert children
    started[0].kill()
    started[0].wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end, "a worker outlived its parent"
        time.sleep(0.1)


def test_ctrl_c_stops_a_run_that_goes_on_later(init: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", ("engine.checkpoint_every_steps=3",)
    started = start(TRAIN, [str(init), str(out), "t", "0.3", *settings], 1)
    wait_for_step(out, 5, started)
    started[0].send_signal(signal.SIGINT)
    ((code, _, _),) = finish(started, 60)
    assert code == 130
    assert run(1, init, out, "t", *settings)[0][0] == 0
    assert len(steps(out)) == 20


def test_torchrun_starts_the_ranks(init: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, str(init), str(tmp_path / "out"), "t,a", "0", "stages.sft.steps=4"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["identity"]["world"] == 2 and record["identity"]["parallel"] == "ddp"
