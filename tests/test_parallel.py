"""Two real processes that train one model, and the second process of the demo."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus.demo.beside import beside
from nexus.errors import NexusError
from nexus.progress import Progress
from nexus.recipe import OptimConfig
from nexus.train.loop import Pace, fit
from nexus.train.parallel import Ranks

STEPS = 30


class Quiet:
    """A display that shows nothing."""

    total: int | None = None

    def advance(self, n: int = 1, **values: float) -> None: ...


def toy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def rows(place: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(place)
    x = torch.randn(4, 6, generator=generator)
    return x, x[:, :2] * x[:, 2:4]


def train(ranks: Ranks, draw: Callable[[int], tuple[Tensor, Tensor]], seconds: float | None = None) -> nn.Module:
    torch.set_num_threads(1)
    model = toy()

    def losses(step: int) -> dict[str, Tensor]:
        x, y = draw(step)
        return {"loss": (model(x) - y).square().mean()}

    pace = Pace(0.0, 1, STEPS) if seconds is None else Pace(seconds, 1)
    fit(dict(model.named_parameters()), OptimConfig(rate=0.01), losses, pace, Quiet(), False, ranks=ranks)
    return model


def one_rank(rank: int, meeting: Path, out: Path, seconds: float | None) -> None:
    ranks = Ranks.join(rank, 2, meeting)
    model = train(ranks, lambda step: rows(ranks.place(step)), seconds)
    torch.save(model.state_dict(), out / f"{rank}.pt")
    ranks.leave()


def two_ranks(tmp_path: Path, seconds: float | None = None) -> list[dict[str, Tensor]]:
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=one_rank, args=(rank, tmp_path / "m", tmp_path, seconds)) for rank in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_learn_what_one_process_learns_from_the_joined_rows(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path)
    joined = train(
        Ranks(), lambda step: tuple(torch.cat(p) for p in zip(rows(2 * step), rows(2 * step + 1), strict=True))
    )  # type: ignore[arg-type,return-value]
    for name, tensor in joined.state_dict().items():
        assert torch.equal(first[name], second[name]), "ranks drifted apart"
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)


def test_ranks_agree_on_a_number_of_steps_that_each_would_measure_differently(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path, seconds=0.2)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_process_alone_averages_nothing_and_draws_every_row() -> None:
    alone = Ranks()
    model = toy()
    model(rows(0)[0]).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    alone.average(model.parameters())
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True) if p.grad is not None)
    assert (alone.place(7), alone.share(5), alone.agree(3)) == (7, 5, 3)


def test_ranks_never_draw_the_same_rows() -> None:
    drawn = {Ranks(rank, 3).place(step) for rank in range(3) for step in range(20)}
    assert len(drawn) == 60


def leave_a_note(progress: Progress, path: Path) -> None:
    with progress.stage("aside", total=3) as stage:
        for _ in range(3):
            stage.advance(1, loss=0.5)
    path.write_text(f"{os.getpid()} {torch.get_num_threads()}")


def complain(progress: Progress) -> None:
    raise NexusError("the data of the second track are broken")


def sleep_long(progress: Progress, path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(60)


def die(progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_second_process_works_with_its_own_threads_and_its_progress_is_shown_here(
    tmp_path: Path, capsys: Any
) -> None:
    with Progress() as progress, beside(leave_a_note, (tmp_path / "note",), 1, progress):
        pass
    pid, threads = (tmp_path / "note").read_text().split()
    assert int(pid) != os.getpid() and threads == "1"
    assert "aside: done at 3/3" in capsys.readouterr().err


def test_a_mistake_in_the_second_process_is_raised_here() -> None:
    with pytest.raises(NexusError, match="second track are broken"), beside(complain, (), 1, Progress()):
        pass


def test_a_second_process_that_dies_is_not_taken_for_a_success() -> None:
    with pytest.raises(RuntimeError, match="ended with code -9"), beside(die, (), 1, Progress()):
        pass


def test_a_failure_here_ends_the_second_process(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(ValueError, match="mine"), beside(sleep_long, (note,), 1, Progress()):
        while not note.exists() or not note.read_text():
            time.sleep(0.05)
        raise ValueError("mine")
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
