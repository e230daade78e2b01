"""Model folders: config.json, weights in safetensors shards, and what the caller puts beside them.

Strict in both directions, and ready for full-size models: weights are written shard by shard, read without a second
copy, and every name and shape is checked before the first one is read.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nexus.errors import BadCheckpoint
from nexus.model.omni import OmniModel
from nexus.model.voice.delayed import Int8Voice
from nexus.organs import ModelConfig
from nexus.recipe import validate

FORMAT = "nexus-omni/1"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 2 * 2**30
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class ShardWriter:
    """Weights into `folder`, at most max_bytes in memory and in one file: `model.safetensors`, or numbered shards and
    an index as transformers writes them. Nothing has its final name before `close`."""

    def __init__(self, folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._held: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """One weight; it is kept until its shard is full."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > self._max_bytes:
            self._flush()
        self._held[name] = tensor.detach().cpu().contiguous()
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        path = self._partial(len(self._shards))
        save_file(self._held, path, {"format": "pt"})
        path.chmod(0o666 & ~_umask())  # the library leaves it to its owner alone
        self._shards.append(list(self._held))
        self._held, self._bytes = {}, 0

    def _partial(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.partial"

    def close(self) -> None:
        """Write what is held and give the shards their names."""
        if self._held or not self._shards:
            self._flush()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        for number, name in enumerate(names):
            self._partial(number).replace(self._folder / name)
        if count > 1:
            places = {weight: name for name, shard in zip(names, self._shards, strict=True) for weight in shard}
            index = {"metadata": {"total_size": self._total}, "weight_map": places}
            (self._folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_config(folder: Path, config: ModelConfig, about: Mapping[str, Any]) -> None:
    """Write config.json; `about` (recipe, scores, dates, sources) goes into its own key."""
    tree = {"format": FORMAT, "model": config.model_dump(mode="json"), "about": dict(about)}
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def save_model(
    folder: Path, model: OmniModel, about: Mapping[str, Any], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config.json and the weights of a model. Raises BadCheckpoint for a voice in eight bits, which is a way to
    speak and no way to keep weights."""
    if isinstance(model.voice, Int8Voice):
        raise BadCheckpoint(f"{folder}: its voice is in eight bits and is not saved so; save the model as loaded")
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, max_shard_bytes)
    for name, tensor in model.state_dict().items():
        writer.add(name, tensor)
    writer.close()
    write_config(folder, model.config, about)


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model section and `about` of a model folder. Raises BadCheckpoint or BadConfig."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder}: no such model folder; make one with `nexus demo` or `nexus build`")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise BadCheckpoint(f"{folder}: holds no config.json, so it is no model folder") from None
    except ValueError as error:
        raise BadCheckpoint(f"{path}: is no JSON: {error}") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
        raise BadCheckpoint(f"{path}: expected format {FORMAT!r}, found {found!r}; is it a model folder of nexus?")
    return validate(ModelConfig, tree.get("model"), f"{path}: model"), tree.get("about", {})


def load_model(folder: Path, device: str | torch.device = "cpu") -> OmniModel:
    """The model of a folder, in evaluation mode and in the folder's own types of numbers; only float16, which
    processors store and do not compute with, is widened to float32 on the CPU.

    Raises BadCheckpoint naming missing, unexpected, misshapen, mistyped or not finite weights.
    """
    config, _ = read_config(folder)
    with torch.device("meta"):  # names and shapes alone; the weights are put in their place without a copy
        model = OmniModel(config)
    expected = model.state_dict()
    shards = weight_files(folder)
    places = {name: path for path in shards for name in weight_shapes(path)}
    check_names(places, expected, str(shards[0] if len(shards) == 1 else folder))
    for path in shards:
        for name, shape in weight_shapes(path).items():
            _check_shape(name, shape, expected[name], str(path))
    weights: dict[str, Tensor] = {}
    for path in shards:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                weights[name] = _aligned(_widened(file.get_tensor(name)))
                check_weight(name, weights[name], expected[name], str(path))
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()


def halve(folder: Path, out: Path) -> int:
    """A model folder at half the size, its float32 weights as float16, everything else as it is; returns its bytes.

    Raises BadCheckpoint for a folder that is no model, for a weight that float16 cannot hold, and for an `out` that
    exists.
    """
    if out.exists():
        raise BadCheckpoint(f"{out} exists; give another --out or remove it")
    read_config(folder)
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    try:
        writer = ShardWriter(part)
        for path in weight_files(folder):
            weight_shapes(path)
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    writer.add(name, _halved(name, file.get_tensor(name), path))
        writer.close()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def _halved(name: str, wide: Tensor, path: Path) -> Tensor:
    half = wide.half() if wide.dtype == torch.float32 else wide
    if half.is_floating_point() and not bool(torch.isfinite(half).all()):
        raise BadCheckpoint(f"{path}: {name} holds values that float16 does not; ship it as it is")
    return half


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 and tensor.device.type == "cpu" else tensor


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address as torch itself chooses them: at others, kernels sum in another order, and a saved
    model would not speak bit for bit as before."""
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % 64 else tensor


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights. Raises BadCheckpoint when one is missing."""
    index = folder / INDEX
    names = [SINGLE]
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(places.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{index}: no index of weights: {error!r}; copy the folder again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise BadCheckpoint(
                f"{index}: names {name!r}, which is no file beside it; is the folder what you took it for?"
            )
        if not (folder / name).is_file():
            raise BadCheckpoint(f"{folder}: {name} is missing")
    return [folder / name for name in names]


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header alone. Raises BadCheckpoint when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(f"{path}: damaged or no safetensors file: {' '.join(str(error).split())}") from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Put weights into a model: every key and shape must be the expected one and every value finite."""
    expected = model.state_dict()
    check_names(weights, expected, where)
    for name, tensor in weights.items():
        check_weight(name, tensor, expected[name], where)
    model.load_state_dict(weights)


def check_names(given: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raises BadCheckpoint unless both have the same keys."""
    missing, extra = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or extra:
        raise BadCheckpoint(
            f"{where}: {_some('missing', missing)}{_some('unexpected', extra)}; another recipe's weights?"
        )


def check_weight(name: str, tensor: Tensor, expected: Tensor, where: str) -> None:
    """Raises BadCheckpoint unless shape and kind of number are the expected ones and every value is finite."""
    _check_shape(name, tuple(tensor.shape), expected, where)
    # Eight-bit floats are quantised weights with scales of their own: taken as numbers they would be nonsense.
    if expected.is_floating_point() and tensor.dtype not in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ):
        raise BadCheckpoint(
            f"{where}: {name} holds {tensor.dtype}, expected float32, float16 or bfloat16; quantised weights must be "
            "turned back first"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise BadCheckpoint(f"{where}: {name} holds NaN or infinite values; the file is damaged or training diverged")


def _check_shape(name: str, shape: tuple[int, ...], expected: Tensor, where: str) -> None:
    if shape != tuple(expected.shape):
        wanted = list(expected.shape)
        raise BadCheckpoint(f"{where}: {name} has shape {list(shape)}, the recipe needs {wanted}")


def _some(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {kind} weights ({shown}) "
