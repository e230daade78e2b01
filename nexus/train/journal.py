"""What a run writes about its steps: a line of JSON for each, and the displays that the recipe names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from nexus.errors import BadConfig
from nexus.recipe import Recipe


@runtime_checkable
class Display(Protocol):
    """Somewhere that numbers are shown by name and step."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def close(self) -> None: ...


class Journal:
    """The steps of one stage: `steps.jsonl`, and events of TensorBoard or W&B where the recipe names them.

    Steps that a killed run took behind its last checkpoint are taken again: their lines go when the run goes on.
    """

    def __init__(self, out: Path, stage: str, recipe: Recipe, first: int) -> None:
        self._path = out / f"{stage}.steps.jsonl"
        _keep_steps(self._path, first)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._displays = [_display(name, out, stage, recipe, first) for name in recipe.engine.log]

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of the step that made it `step` steps."""
        print(json.dumps({"step": step, **numbers}), file=self._file, flush=True)
        for display in self._displays:
            for name, number in numbers.items():
                display.add_scalar(name, number, step)

    def close(self) -> None:
        """The end of the stage, or of the run."""
        self._file.close()
        for display in self._displays:
            display.close()


def _keep_steps(path: Path, first: int) -> None:
    if not path.is_file():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= first), encoding="utf-8")


def _display(name: str, out: Path, stage: str, recipe: Recipe, first: int) -> Display:
    match name:
        case "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise BadConfig(
                    "engine.log names tensorboard, which is not installed; pip install tensorboard, or set "
                    "engine.log=[]"
                ) from None
            writer: Any = SummaryWriter(str(out / "tensorboard" / stage), purge_step=first + 1)
            return writer
        case "wandb":
            return _Wandb(out, stage, recipe)
    raise AssertionError(name)


class _Wandb:
    """A run of Weights & Biases, which goes on under the same name when training goes on."""

    def __init__(self, out: Path, stage: str, recipe: Recipe) -> None:
        try:
            import wandb
        except ImportError:
            raise BadConfig(
                "engine.log names wandb, which is not installed; pip install wandb, or leave it out"
            ) from None
        identity = f"{out.resolve().name}-{stage}"
        self._run = wandb.init(
            project="nexus",
            name=identity,
            id=identity,
            dir=str(out),
            resume="allow",
            config=recipe.model_dump(mode="json"),
        )

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self._run.log({tag: scalar_value}, step=global_step)

    def close(self) -> None:
        self._run.finish()
