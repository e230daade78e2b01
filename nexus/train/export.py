"""A trained model as a model folder: what was trained from memory, everything else from the folder it was loaded from.

Frozen weights are copied, not written again, so they are the same bit for bit whatever type training computed in.
"""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nexus.errors import NexusError
from nexus.model.adapters import save_adapter
from nexus.model.folder import ShardWriter, read_config, weight_files, write_config
from nexus.recipe import Recipe
from nexus.train.lora import LoraLinear, merged, pair
from nexus.train.parallel import Ranks, whole

OWN = ("config.json", "README.md")  # written anew; all other files of the source but its weights are copied


def export(
    folder: Path, source: Path, model: nn.Module, trained: Collection[str], note: Mapping[str, Any], ranks: Ranks
) -> None:
    """Write `folder` as the model of `source` with the parameters `trained` as they are in memory, in the types they
    have in `source`. All ranks must call; the first writes, one weight at a time. `note` goes into config.json.

    Adapters are merged. Raises NexusError where the disk is full.
    """
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    keeps = ranks.rank == 0
    if keeps:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    writer = ShardWriter(folder)
    try:
        for path in weight_files(source):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    learned = _learned(name, parameters, modules, trained)
                    if keeps:
                        kept = file.get_tensor(name)
                        writer.add(name, kept if learned is None else learned.to(kept.dtype))
        if keeps:
            writer.close()
            config, about = read_config(source)
            write_config(folder, config, {**about, "trained": [*about.get("trained", []), dict(note)]})
            for path in source.iterdir():
                if path.is_file() and path.name not in OWN and not path.name.startswith("model"):
                    shutil.copyfile(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        raise NexusError(
            f"{folder}: cannot be written: {' '.join(str(error).split())}; the last checkpoint is whole: make room and "
            "run the same command again"
        ) from None


@torch.no_grad()
def _learned(
    name: str, parameters: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module], trained: Collection[str]
) -> Tensor | None:
    """A weight as it is now, in one piece on the CPU; None where it was not trained."""
    owner, _, last = name.rpartition(".")
    layer = modules.get(owner)
    if isinstance(layer, LoraLinear) and last == "weight":
        return merged(layer).cpu()
    return whole(parameters[name].detach()).cpu() if name in trained else None


def export_adapter(folder: Path, model: nn.Module, alpha: float, base: Path, ranks: Ranks) -> None:
    """Write the adapters of a model in PEFT's layout; all ranks must call."""
    pairs = {name: pair(layer) for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}
    if ranks.rank == 0:
        save_adapter(folder, pairs, alpha, base=str(base))


def write_card(folder: Path, recipe: Recipe, source: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """README.md of a trained model: what it came from, what was trained on what, and how to use it."""
    rows = [
        f"| {name} | `{' '.join(of['trainable'])}` | {of['steps']} | {of['rows']} | {of['data']} |"
        for name, of in records.items()
    ]
    lines = [
        "---",
        f"license: {recipe.licence.lower()}",
        "library_name: nexus-omni",
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"Trained with `nexus train` from the model folder `{source.name}`; what was not trained is as it was there.",
        "",
        "| stage | trains | steps | rows seen | data |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "The data are named by their fingerprints. Licences are those of the first model folder and of the data.",
        "",
        "```sh",
        "nexus chat PATH_OF_THIS_FOLDER",
        "```",
        "",
    ]
    old = source / "README.md"
    if old.is_file():
        lines += ["## Card of the model it was trained from", "", _body(old.read_text(encoding="utf-8")), ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _body(card: str) -> str:
    """A card without its front matter, its headings two levels deeper."""
    if card.startswith("---\n"):
        card = card.partition("\n---\n")[2]
    return "\n".join(f"##{line}" if line.startswith("#") else line for line in card.strip().split("\n"))
