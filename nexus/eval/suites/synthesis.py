"""Seed-TTS-eval: which sentences are to be spoken in whose voice, and the scores of what was spoken.

The published score is the mean of each utterance's error rate and skips outputs that are missing. Here a missing
output is all wrong, and the corpus error rate stands beside the mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nexus.errors import BadRecord
from nexus.eval.scores import rate_interval
from nexus.eval.suites.normalise import Language, error_counts, rate_name
from nexus.eval.suites.rows import read_lines

PROTOCOLS: dict[Language, str] = {"en": "seedtts-en", "zh": "seedtts-zh+opencc"}


@dataclass(frozen=True)
class Utterance:
    """A sentence to speak. The prompt gives the voice; `truth` is the same sentence from a person."""

    id: str
    text: str
    prompt_text: str | None = None
    prompt: Path | None = None
    truth: Path | None = None


def read_meta(path: Path) -> list[Utterance]:
    """The utterances of a `meta.lst`: lines id|prompt text|prompt wav|text|truth wav, without the last field, or
    id|text|prompt wav, or id|text. Relative wavs lie beside the file; a ".wav" at the end of an id is no part of it.

    The spoken file of an utterance is named {id}.wav. Wavs are not opened. Raises BadRecord with file:line.
    """
    utterances: dict[str, Utterance] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        utterance = _utterance(line, path.parent, f"{path}:{number}")
        if utterance.id in utterances:
            raise BadRecord(f"{path}:{number}: id {utterance.id!r} occurs twice, expected unique ids; repair the file")
        utterances[utterance.id] = utterance
    return list(utterances.values())


def score_synthesis(
    utterances: Sequence[Utterance], transcripts: Mapping[str, str], language: Language
) -> dict[str, object]:
    """Error rates of what a recogniser heard, by utterance id; an id without transcript is a missing output.

    `mean_wer_percent` (`mean_cer_percent` for Chinese) is the mean over utterances times 100 with 3 decimals, as
    published, but for missing outputs, which count 100; `mean_wer_percent_of_given` leaves them out as the published
    script does (None if all are missing). `mean_ci95` is the interval of the mean as a fraction. `wer` and `ci95` are
    those of the corpus, where a missing output leaves out all its words. Besides `n`, `missing` (ids) and `protocol`.
    Raises BadRecord for no utterances, a transcript of no utterance, a text without a word, and as `error_counts`.
    """
    if not utterances:
        raise BadRecord("a score of 0 utterances is undefined, expected at least 1; choose a test set with sentences")
    unknown = sorted(set(transcripts) - {utterance.id for utterance in utterances})
    if unknown:
        raise BadRecord(
            f"{len(unknown)} transcripts are of no utterance, first {unknown[0]!r}; the {len(utterances)} utterances "
            f"are {utterances[0].id!r} .. {utterances[-1].id!r}; remove them or name their test set"
        )
    heard = [transcripts.get(utterance.id, "") for utterance in utterances]
    counts = error_counts([utterance.text for utterance in utterances], heard, language, PROTOCOLS[language])
    wordless = np.flatnonzero(counts[:, 1] == 0)
    if len(wordless):
        first = utterances[wordless[0]]
        raise BadRecord(f"utterance {first.id!r}: text {first.text!r} holds no word to compare, expected at least one")
    rates = counts[:, 0] / counts[:, 1]
    given = np.array([utterance.id in transcripts for utterance in utterances])
    name = rate_name(language)
    return {
        f"mean_{name}_percent": round(float(rates.mean()) * 100, 3),
        f"mean_{name}_percent_of_given": round(float(rates[given].mean()) * 100, 3) if given.any() else None,
        "mean_ci95": rate_interval(rates, np.ones(len(rates))),
        name: int(counts[:, 0].sum()) / int(counts[:, 1].sum()),
        "ci95": rate_interval(*counts.T),
        "n": len(utterances),
        "missing": [utterance.id for utterance in utterances if utterance.id not in transcripts],
        "protocol": PROTOCOLS[language],
    }


def speaker_similarity(prompts: np.ndarray, spoken: np.ndarray, missing: int = 0) -> dict[str, object]:
    """Mean cosine of speaker embeddings of prompts and of what was spoken, f [N, D] each, row by row.

    Gives `similarity` (-1 .. 1) in which `missing` outputs count 0, `similarity_of_given` without them, `n` (all) and
    `ci95`. The embeddings come from a model of the user's: the published numbers are WavLM-large's. Raises BadRecord
    for shapes that differ, no rows, and rows that are not finite or all zero.
    """
    if prompts.ndim != 2 or prompts.shape != spoken.shape or not len(prompts):
        raise BadRecord(
            f"speaker similarity needs embeddings [N, D] of equal shape with a row, got {list(prompts.shape)} for "
            f"prompts and {list(spoken.shape)} for what was spoken; give one row each for every utterance"
        )
    given = (_unit_rows(prompts, "prompts") * _unit_rows(spoken, "what was spoken")).sum(1)
    cosine = np.concatenate([given, np.zeros(missing)])
    return {
        "similarity": float(cosine.mean()),
        "similarity_of_given": float(given.mean()),
        "n": len(cosine),
        "ci95": rate_interval(cosine, np.ones(len(cosine))),
    }


def _utterance(line: str, folder: Path, where: str) -> Utterance:
    match [field.strip() for field in line.split("|")]:
        case [id, prompt_text, prompt, text, truth]:
            utterance = Utterance(id, text, prompt_text, folder / prompt, folder / truth)
        case [id, prompt_text, prompt, text]:
            utterance = Utterance(id, text, prompt_text, folder / prompt)
        case [id, text, prompt]:
            utterance = Utterance(id, text, None, folder / prompt)
        case [id, text]:
            utterance = Utterance(id, text)
        case fields:
            raise BadRecord(f"{where}: has {len(fields)} fields between '|', expected 5, 4, 3 or 2; repair the line")
    if not all(field.strip() for field in line.split("|")):
        raise BadRecord(f"{where}: has an empty field, expected text in each; repair the line")
    return Utterance(
        utterance.id.removesuffix(".wav"), utterance.text, utterance.prompt_text, utterance.prompt, utterance.truth
    )


def _unit_rows(vectors: np.ndarray, name: str) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    largest = np.abs(vectors).max(1, keepdims=True, initial=0.0)
    bad = np.flatnonzero(~np.isfinite(vectors).all(1) | (largest[:, 0] == 0))
    if len(bad):
        raise BadRecord(
            f"speaker embeddings of {name}: row {bad[0]} is {'all zero' if not vectors[bad[0]].any() else 'not finite'}"
            f" ({len(bad)} of {len(vectors)} rows), expected a direction; embed these files again"
        )
    vectors = vectors / largest
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
