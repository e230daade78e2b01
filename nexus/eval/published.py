"""What the Nexus paper reports on the benchmarks that are also suites here (its tables 3 to 6), to stand beside a run.

Numbers are the paper's, in percent or BLEU, None where it has none. Its vision benchmarks (table 2) run in lmms-eval
and stand in docs/lmms-eval.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nexus.eval.report import Table

PAPER = "Nexus: An Omni-Perceptive And -Interactive Model for Language, Audio, And Vision"


@dataclass(frozen=True)
class Column:
    """One column of a published table: its heading, the key of the same score in ours, the factor to the paper's unit,
    and the part of the data it is about (None: the whole suite)."""

    heading: str
    key: str
    factor: float = 100.0
    part: str | None = None


@dataclass(frozen=True)
class Published:
    """A table of the paper, cut to one benchmark."""

    number: int
    columns: tuple[Column, ...]
    rows: Mapping[str, tuple[float | None, ...]]


TABLES = {
    "llama_questions": Published(
        3,
        (Column("accuracy %", "accuracy"),),
        {
            "SpeechGPT-7B": (21.60,),
            "Spectron-1B": (22.90,),
            "Moshi-7B": (62.30,),
            "GLM-4-Voice-9B": (64.70,),
            "MiniCPM-o2.6-7B": (61.00,),
            "Mini-Omni-0.5B": (22.00,),
            "Llama-Omni-8B": (45.30,),
            "Nexus": (67.33,),
        },
    ),
    "librispeech": Published(
        4,
        (Column("test-clean WER %", "wer", part="test-clean"), Column("test-other WER %", "wer", part="test-other")),
        {
            "Qwen2-Audio-Instruct-7B": (1.70, 4.00),
            "Mini-Omni2-0.5B": (9.80, 4.70),
            "VITA-1.5-7B": (7.20, 3.40),
            "MinMo-7B": (1.74, 3.89),
            "MiniCPM-o2.6-7B": (1.70, 3.89),
            "Nexus": (3.50, 5.29),
        },
    ),
    "nexus_audio": Published(
        4,
        (Column("Chinese CER %", "cer"), Column("English WER %", "wer")),
        {
            "Qwen2-Audio-Instruct-7B": (35.45, 26.12),
            "Mini-Omni2-0.5B": (117.71, 54.69),
            "VITA-1.5-7B": (127.34, 122.71),
            "MiniCPM-o2.6-7B": (12.00, 18.00),
            "Nexus": (11.82, 12.32),
        },
    ),
    "aishell2": Published(4, (Column("CER %, all devices", "cer"),), {"Nexus": (3.35,)}),
    "covost2": Published(
        5,
        (Column("Chinese to English BLEU", "bleu_zh_en", 1.0), Column("English to Chinese BLEU", "bleu_en_zh", 1.0)),
        {
            "Qwen2-Audio-7B": (24.40, 45.20),
            "Qwen2-Audio-Instruct-7B": (22.90, 39.50),
            "MinMo-7B": (25.95, 46.68),
            "MiniCPM-o2.6-7B": (27.20, 48.20),
            "Nexus": (23.17, 40.21),
        },
    ),
    "seed_tts": Published(
        6,
        (Column("Chinese CER %", "mean_cer_percent", 1.0), Column("English WER %", "mean_wer_percent", 1.0)),
        {
            "CosyVoice1.0": (8.64, 3.59),
            "CosyVoice2.0": (4.61, 2.43),
            "CosyVoice2.0-SFT": (2.06, 3.19),
            "MinMo-7B": (2.48, 2.90),
            "Nexus (Fishspeech1.4)": (7.55, 13.02),
            "Nexus (CosyVoice2.0)": (4.53, 4.11),
        },
    ),
}


def beside(scores: Mapping[str, Any], protocol: Mapping[str, Any]) -> Table | None:
    """The paper's table on the benchmark of a suite (`protocol["kind"]`), this run in its last row; None where the
    paper has no such benchmark. A part of the benchmark, or a limit on its items, is said in the note."""
    published = TABLES.get(protocol["kind"])
    if published is None:
        return None
    ours = tuple(_ours(column, scores, protocol) for column in published.columns)
    rows = (*((name, *values) for name, values in published.rows.items()), ("this run", *ours))
    limit = f" Only the first {scores['n']} items: no comparison." if protocol.get("limit") else ""
    note = f"Table {published.number} of {PAPER!r}, and this run, n = {scores['n']}.{limit}"
    return Table("As published", note, ("model", *(column.heading for column in published.columns)), rows)


def _ours(column: Column, scores: Mapping[str, Any], protocol: Mapping[str, Any]) -> float | None:
    if column.part is not None and protocol.get("split") != column.part:
        return None
    value = scores.get(column.key)
    return None if value is None else round(value * column.factor, 2)
