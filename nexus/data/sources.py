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
    tokenizer: ChatTokenizer,
    specs: ModelConfig,
    cache: Path,
    told: Callable[[str, int], None] | None = None,
) -> list[Source]:
    """One source per file of `data.train`: JSONL, or lhotse's cuts. Indexes are kept in the folder `cache`.

    `told(file, rows)` is called while a file is measured. Raises BadConfig, BadRecord and BadMedia.
    """
    files = (SourceConfig(path=config.train),) if isinstance(config.train, str) else config.train
    if not files:
        raise BadConfig("data.train: names no file, expected one of rows; give --set data.train=FILE.jsonl")
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
