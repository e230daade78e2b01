"""The engine's parts by themselves: checkpoints, the journal, types of numbers, where a run takes place."""

import json
from pathlib import Path

import pytest
import torch
from launch import recipe_for
from tiny import tiny_model
from torch import nn

from nexus.errors import BadCheckpoint, BadConfig, NexusError
from nexus.recipe import OptimConfig, StageConfig
from nexus.train.checkpoint import Checkpoints, read_about, restore
from nexus.train.journal import Journal
from nexus.train.loop import Done, Pace, descend
from nexus.train.parallel import Ranks
from nexus.train.sharding import Place, cast
from nexus.train.stage import freeze, optimizers
from nexus.training import EngineConfig

ALONE = Ranks()
OPTIM = OptimConfig(rate=0.01, muon=("0.weight",), warmup_steps=2)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def learn(model: nn.Module, movers: list[torch.optim.Optimizer], first: int, steps: int) -> list[float]:
    seen: list[float] = []

    def gradients(step: int) -> dict[str, torch.Tensor]:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        model.zero_grad(set_to_none=True)
        loss = (model(x) - x[:, :2]).square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    def note(done: Done) -> None:
        seen.append(float(done.numbers["loss"]))

    descend(dict(model.named_parameters()), movers, OPTIM, gradients, Pace(0.0, 1, steps), note, int, ALONE, first)
    return seen


def test_weights_and_both_optimisers_go_on_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    whole = net()
    expected = learn(whole, optimizers(dict(whole.named_parameters()), OPTIM), 0, 20)
    first = net()
    movers = optimizers(dict(first.named_parameters()), OPTIM)
    learn(first, movers, 0, 9)
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    checkpoints.save(9, dict(first.named_parameters()), movers, {"step": 9})
    second = net()
    movers = optimizers(dict(second.named_parameters()), OPTIM)
    last = checkpoints.last()
    assert last is not None and read_about(last) == {"step": 9}
    restore(last, dict(second.named_parameters()), movers, ALONE)
    assert learn(second, movers, 9, 20) == expected[9:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_the_last_checkpoints_stay_and_no_half_of_one_is_taken_for_whole(tmp_path: Path) -> None:
    model, checkpoints = net(), Checkpoints(tmp_path, 2, ALONE)
    parameters = dict(model.named_parameters())
    assert checkpoints.last() is None
    for step in (5, 10, 15):
        checkpoints.save(step, parameters, optimizers(parameters, OPTIM), {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]
    (tmp_path / "step-00000020.part").mkdir()
    (tmp_path / "step-00000020.part" / "__0_0.distcp").write_bytes(b"half")
    assert checkpoints.last() == tmp_path / "step-00000015"
    checkpoints.save(20, parameters, optimizers(parameters, OPTIM), {"step": 20})
    assert checkpoints.last() == tmp_path / "step-00000020"


def test_a_checkpoint_of_other_parameters_is_refused_by_name(tmp_path: Path) -> None:
    model, checkpoints = net(), Checkpoints(tmp_path, 2, ALONE)
    parameters = dict(model.named_parameters())
    checkpoints.save(1, parameters, [], {})
    fewer = {name: parameter for name, parameter in parameters.items() if name != "2.bias"}
    with pytest.raises(BadCheckpoint, match=r"other parameters than this stage trains \(1 differ, first 2.bias\)"):
        restore(tmp_path / "step-00000001", fewer, [], ALONE)


def test_a_gradient_that_is_no_number_moves_nothing() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]

    def gradients(step: int) -> dict[str, torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, torch.inf)
        return {"loss": torch.tensor(1.0)}

    movers = optimizers(dict(model.named_parameters()), OPTIM)
    with pytest.raises(NexusError, match=r"gradient has norm (inf|nan) at step 0; lower optim.rate"):
        descend(dict(model.named_parameters()), movers, OPTIM, gradients, Pace(0.0, 1, 3), print, int, ALONE)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_steps_behind_the_checkpoint_are_written_again_and_not_twice(tmp_path: Path) -> None:
    recipe = recipe_for()
    journal = Journal(tmp_path, "sft", recipe, 0)
    for step in (1, 2, 3):
        journal.write(step, {"loss": float(step)})
    journal.close()
    path = tmp_path / "sft.steps.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')  # killed in the midst of a line
    journal = Journal(tmp_path, "sft", recipe, 2)
    journal.write(3, {"loss": 9.0})
    journal.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_what_trains_is_float32_and_frozen_matrices_keep_the_types_of_the_folder() -> None:
    model = tiny_model().to(torch.bfloat16)
    trained = freeze(model, ["language.*"])
    cast(model, Place("none", torch.device("cpu"), torch.bfloat16))
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    frozen = [p for name, p in model.named_parameters() if name not in trained]
    assert {p.dtype for p in frozen if p.ndim > 1} == {torch.bfloat16}
    cast(model, Place("none", torch.device("cpu"), torch.float32))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_one_process_trains_without_being_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Ranks.launched() == Ranks()
    assert Place.choose(EngineConfig(), Ranks()).kind == "none"
    with pytest.raises(BadConfig, match="expected one process, found 2"):
        Place.choose(EngineConfig(parallel="none"), Ranks(0, 2))


def test_a_stage_has_one_length() -> None:
    with pytest.raises(ValueError, match=r"steps 3 and epochs 2.0; give one of them"):
        StageConfig(name="sft", trainable=("x",), mixture={"chat": 1}, seconds=0.0, steps=3, epochs=2.0)
