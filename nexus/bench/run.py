"""`nexus bench`: which benchmarks there are, and their results as files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nexus.bench import alignment, decoder, evaluation, factory, gpu, hearing, training, voices
from nexus.bench.race import Say, machine
from nexus.errors import BadConfig
from nexus.results import write_json

NAMES = ("decoder", "hearing", "gpu", "alignment", "voices", "factory", "training", "evaluation")


def run(
    names: Sequence[str],
    out: Path,
    say: Say,
    tiny: bool = False,
    reference: Path | None = None,
    demo: Path | None = None,
) -> dict[str, Any]:
    """Run benchmarks and write NAME.json of each into `out`; returns the results by name.

    Without names: all this machine can run, but not `voices`, which take forty minutes. `reference` is the user's copy
    of the published alignment measures, which are no package; `demo` the folder of a finished demo. `tiny` races very
    small models, which says nothing about speed. Raises BadConfig for a name that there is not, for `gpu` without a
    CUDA device, `alignment` without a reference, `voices` without a demo, and an `out` that is no folder.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise BadConfig(f"no benchmark is called {unknown[0]!r}; there are {', '.join(NAMES)}")
    if "gpu" in names:
        gpu.check()
    if "alignment" in names and reference is None:
        raise BadConfig("alignment is timed against the published measures: name a copy of their file with --reference")
    for name in ("voices", "evaluation"):
        if name in names and demo is None:
            raise BadConfig(f"{name}: measured on what a demo has learned, name its folder with --demo")
    can = {
        "gpu": torch.cuda.is_available(),
        "alignment": reference is not None,
        "voices": False,  # forty minutes: where it is asked for by name
        "evaluation": demo is not None,
    }
    chosen = names or [name for name in NAMES if can.get(name, True)]
    if out.exists() and not out.is_dir():
        raise BadConfig(f"{out} is a file, results go into a folder; name another with --out")
    out.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "decoder": lambda: decoder.bench(decoder.TINY if tiny else decoder.FULL, say),
        "hearing": lambda: hearing.bench(hearing.TINY if tiny else hearing.FULL, say),
        "gpu": lambda: gpu.bench(gpu.TINY if tiny else gpu.FULL, torch.device("cuda"), say),
        "alignment": lambda: alignment.bench(alignment.TINY if tiny else alignment.FULL, reference or Path(), say),
        "factory": lambda: factory.bench(factory.TINY if tiny else factory.FULL, say),
        "training": lambda: training.bench(training.TINY if tiny else training.FULL, say),
        "evaluation": lambda: evaluation.bench(evaluation.TINY if tiny else evaluation.FULL, demo or Path(), say),
        "voices": lambda: voices.bench(
            voices.TINY if tiny else voices.FULL, demo or Path(), out / "voices.rows.jsonl", say
        ),
    }
    results = {}
    for name in chosen:
        about = machine()
        results[name] = {"name": name, "tiny": tiny, "machine": about, **makers[name]()}
        write_json(out / f"{name}.json", results[name])
        say(f"{out / name}.json written")
    return results
