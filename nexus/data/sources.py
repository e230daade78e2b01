"""The files that a recipe's `data.train` names, as sources of a mixture."""

from collections.abc import Callable
from pathlib import Path

from nexus.data.chat import ChatTokenizer
from nexus.data.cuts import ENDING, Cuts
from nexus.data.jsonl import JsonLines
from nexus.data.mixture import Source
from nexus.errors import BadConfig
from nexus.organs import ModelConfig
from nexus.training import DataConfig, SourceConfig


def sources(
    config: DataConfig,
    stage: str,
    tokenizer: ChatTokenizer,
    specs: ModelConfig,
    cache: Path,
    told: Callable[[str, int], None] | None = None,
) -> list[Source]:
    """One source per file of `data.train` for a stage: JSONL, or lhotse's cuts. Indexes are kept in the folder `cache`.

    `told(file, rows)` is called while a file is measured. Raises BadConfig, BadRecord and BadMedia.
    """
    named = (SourceConfig(path=config.train),) if isinstance(config.train, str) else config.train
    files = [file for file in named if not file.stages or stage in file.stages]
    if not files:
        raise BadConfig(
            f"data.train: names no file for stage {stage}, expected one of rows; give --set data.train=FILE.jsonl, or "
            "leave the stage out with --stages"
        )
    return [_source(file, tokenizer, specs, cache, told) for file in files]


def _source(
    file: SourceConfig,
    tokenizer: ChatTokenizer,
    specs: ModelConfig,
    cache: Path,
    told: Callable[[str, int], None] | None,
) -> Source:
    path = Path(file.path)

    def counted(rows: int) -> None:
        if told is not None:
            told(file.path, rows)

    if path.name.endswith(ENDING):
        return Cuts(path, tokenizer, specs, weight=file.weight, limit=file.limit, told=counted)
    if path.suffix == ".jsonl":
        return JsonLines(path, tokenizer, specs, cache, weight=file.weight, limit=file.limit, told=counted)
    raise BadConfig(
        f"data.train: {path}: expected a file of rows (*.jsonl) or of lhotse's cuts (*{ENDING}); make one: nexus data "
        f"import {path} --out rows.jsonl"
    )
