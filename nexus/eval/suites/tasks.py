"""The suites: a folder of data becomes items with references, and the rule by which a reply to one is marked.

A suite is chosen by one visible match (`suite_of`) and knows no responder. Everything that could change a score is in
its `protocol`, which stands in the report.
"""

import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from nexus.data.chat import TASKS
from nexus.data.folders import DIGITS, recordings
from nexus.errors import BadConfig, BadRecord
from nexus.eval.suites import corpora, questions, synthesis
from nexus.eval.suites.corpora import Clip, Language
from nexus.eval.suites.noisy import HELD_OUT_NOISE, LEVELS_DB, NOISE_FOLDER, Noise, levels
from nexus.eval.suites.normalise import error_counts
from nexus.eval.suites.questions import Question
from nexus.eval.suites.rows import read_jsonl, text_of
from nexus.media import load_audio
from nexus.organs import Count, Strict
from nexus.recipe import validate
from nexus.source import Limits
from nexus.text import is_chinese, normalise_en
from nexus.types import Audio, Image, Part, Sample, Text, Turn

Metric = Literal["accuracy", "error_rate", "seed_tts", "bleu"]
Form = Literal["text", "either", "speech"]
NORMALISERS: dict[Language, str] = {"en": "whisper-en+basic", "zh": "speechio-zh"}
TRANSLATE = {
    "zh_en": "Please translate this speech into English. ",
    "en_zh": "Please translate this speech into Chinese. ",
}
USUAL_TEST_INDICES = range(5)  # of the Free Spoken Digit Dataset, for every digit and speaker
AIR_BENCH = (  # as published with its foundation benchmark
    "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, you may only "
    "choose A or B or C or D.\n"
)
TRI_KEYS = {"id", "image", "audio", "text", "question"}
LONG = Limits(max_audio_seconds=6 * 3600.0, max_file_bytes=2**31)  # recordings of which only excerpts are meant
SUITES = (
    "llama_questions",
    "digits",
    *corpora.ASR,
    "robustness",
    "covost2",
    "seed_tts",
    "voicebench",
    "air_bench",
    "tri",
)


class SuiteConfig(Strict):
    """One suite of a FILE.yaml. `data` is relative to the file; `split` as the corpus names it; normalisers by
    language, `instruction` behind the sound, `noise` a folder relative to the data, `limit` the first so many items."""

    kind: str
    data: str | None = None
    split: str | None = None
    normalisers: dict[Language, str] | None = None
    instruction: str | None = None
    noise: str | None = None
    limit: Count | None = None


class SuitesConfig(Strict):
    """A FILE.yaml of several suites by name."""

    suites: dict[str, SuiteConfig]


@dataclass(frozen=True, eq=False)
class Item:
    """What is asked (`turns`, media not loaded), what is right, and to which group (speaker, scenario) it belongs.
    `excerpt` (begin, end) in seconds of the sound that is meant, `noise` what it is heard in."""

    id: str
    turns: tuple[Turn, ...]
    reference: str
    group: str = ""
    language: Language = "en"
    excerpt: tuple[float, float] | None = None
    noise: Noise | None = None
    prompt: Path | None = None  # whose voice is to be heard in the answer

    @property
    def media(self) -> list[Path]:
        """The files that are asked about, and the noise."""
        parts = [part for turn in self.turns for part in turn.parts if not isinstance(part, Text)]
        noises = [self.noise.path] if self.noise else []
        return [*(part.path for part in parts if part.path is not None), *noises]

    def sample(self) -> Sample:
        """The item as a responder gets it: without reference; an excerpt is cut out here, noise is mixed in."""
        if self.excerpt is None and self.noise is None:
            return Sample(self.id, "", self.turns)
        heard = self._cut if self.noise is None else self.noise.around
        turns = tuple(replace(turn, parts=tuple(heard(part) for part in turn.parts)) for turn in self.turns)
        return Sample(self.id, "", turns)

    def _cut(self, part: Part) -> Part:
        if not isinstance(part, Audio) or part.path is None or self.excerpt is None:
            return part
        whole = _long_sound(part.path)
        assert whole.samples is not None
        begin, end = (round(seconds * whole.rate_hz) for seconds in self.excerpt)
        if not 0 <= begin < end <= len(whole.samples):
            raise BadRecord(
                f"item {self.id}: {self.excerpt[0]:g} to {self.excerpt[1]:g} s lies outside {part.path}, which has "
                f"{whole.seconds:.2f} s; fetch the sound again"
            )
        return Audio(samples=whole.samples[begin:end], rate_hz=whole.rate_hz)


@functools.lru_cache(maxsize=1)  # the excerpts of one recording stand side by side
def _long_sound(path: Path) -> Audio:
    return load_audio(path, limits=LONG)


@dataclass(frozen=True, eq=False)
class Suite:
    """Items and how replies to them are marked. `protocol` is JSON and holds all that a score depends on but data,
    responder, recogniser and judge; `is_right` marks a reply where the metric is accuracy; `questions` is what a judge
    is told; `chooses`, for choices, says whether a reply names one at all; `form` whether text, either or speech is
    answered; `ids` are those of all items, before a limit; `groups` is what the groups of its items are called."""

    name: str
    metric: Metric
    items: tuple[Item, ...]
    protocol: Mapping[str, Any]
    is_right: Callable[[Item, str], bool] = lambda item, reply: False
    questions: Mapping[str, str] = field(default_factory=dict)
    chooses: Callable[[str], bool] | None = None
    form: Form = "text"
    ids: frozenset[str] = frozenset()
    groups: str = "groups"

    def fingerprint(self) -> str:
        """Digest of the items: words, references and the bytes of every medium, wherever they lie."""
        digest = hashlib.sha256()
        for item in self.items:
            words = [part.text for turn in item.turns for part in turn.parts if isinstance(part, Text)]
            row: list[Any] = [item.id, words, item.reference, item.group, item.language, item.excerpt]
            row += [] if item.noise is None else [item.noise.snr_db]
            digest.update(json.dumps(row).encode())
        for path in dict.fromkeys(path for item in self.items for path in item.media):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]


def suites_of(suite: str, data: Path | None, split: str | None = None) -> list[tuple[str, SuiteConfig, Path]]:
    """(name, settings, data) of the suites that a command line names: NAME (`-` and `_` alike) or FILE.yaml.

    Raises BadConfig for an unknown name, a file that is no such list, and data named nowhere or twice.
    """
    if not suite.endswith((".yaml", ".yml")):
        name = suite.replace("-", "_")
        if data is None:
            raise BadConfig(f"suite {suite}: needs its data; name the folder with --data")
        return [(name, SuiteConfig(kind=name, split=split), data)]
    path = Path(suite)
    if split is not None:
        raise BadConfig(f"{path}: a split is named in the file, not beside it; write `split: {split}` there")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"{path}: cannot be read ({error.strerror}); name a suite or an existing FILE.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path}: is no YAML: {' '.join(str(error).split())}") from None
    several = isinstance(tree, dict) and "suites" in tree
    named = (
        validate(SuitesConfig, tree, str(path)).suites
        if several
        else {path.stem.replace("-", "_"): validate(SuiteConfig, tree, str(path))}
    )
    if not named:
        raise BadConfig(f"{path}: suites is empty; expected NAME: {{kind: ..., data: ...}}")
    return [(name, config, _data_of(path, name, config, data)) for name, config in named.items()]


def _data_of(path: Path, name: str, config: SuiteConfig, data: Path | None) -> Path:
    if (config.data is None) == (data is None):
        given = "neither there nor" if data is None else "there and"
        raise BadConfig(f"{path}: {name}.data: expected in one place, given {given} with --data; name it once")
    return data if config.data is None and data is not None else path.parent / str(config.data)


def suite_of(name: str, config: SuiteConfig, data: Path) -> Suite:
    """The suite, read and checked, with its first `limit` items.

    Raises BadConfig for an unknown kind or a setting it has no use for, BadRecord for data of another layout, repeated
    ids, empty references, references in another script and media that are not there.
    """
    kind = config.kind.replace("-", "_")
    match kind:
        case "llama_questions":
            suite = _llama_questions(config, data)
        case "digits":
            suite = _digits(config, data)
        case "robustness":
            suite = _robustness(config, data)
        case "covost2":
            suite = _covost2(config, data)
        case "seed_tts":
            suite = _seed_tts(config, data)
        case "voicebench" | "air_bench":
            suite = _choices(kind, config, data)
        case "tri":
            suite = _tri(config, data)
        case _ if kind in corpora.ASR:
            suite = _asr(kind, config, data)
        case _:
            raise BadConfig(f"suite {kind!r} is unknown{_did_you_mean(kind)}; expected one of {', '.join(SUITES)}")
    _check(suite, data)
    protocol = {"kind": kind, **suite.protocol, "limit": config.limit, "items": len(suite.items)}
    ids = frozenset(item.id for item in suite.items)
    return replace(suite, name=name, items=suite.items[: config.limit], protocol=protocol, ids=ids)


def _check(suite: Suite, data: Path) -> None:
    """What no suite may be: empty, ambiguous, without an answer, or about media that are not there."""
    if not suite.items:
        raise BadRecord(f"{data}: this suite has no items, expected at least 1; is the folder complete?")
    seen: set[str] = set()
    for item in suite.items:
        if item.id in seen:
            raise BadRecord(f"{data}: id {item.id!r} occurs twice, expected each once; remove or rename one")
        seen.add(item.id)
        if not item.reference.strip():
            raise BadRecord(f"{data}: item {item.id!r} has an empty reference, expected a text; repair or remove it")
    absent = [(item.id, path) for item in suite.items for path in item.media if not path.is_file()]
    if absent:
        raise BadRecord(
            f"{data}: item {absent[0][0]!r} needs {absent[0][1]}, which is not there ({len(absent)} of "
            f"{len(suite.items)} items lack a file); fetch the data whole"
        )


def _did_you_mean(kind: str) -> str:
    close = difflib.get_close_matches(kind, SUITES, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _asked(*parts: Part) -> tuple[Turn, ...]:
    return (Turn("user", tuple(part for part in parts if not isinstance(part, Text) or part.text)),)


def _only(config: SuiteConfig, kind: str, *allowed: str) -> None:
    """Refuse settings that this kind has no use for: they would be said in vain."""
    for key in ("split", "normalisers", "instruction", "noise"):
        if key not in allowed and getattr(config, key) is not None:
            raise BadConfig(f"suite {kind}: has no {key}, given {getattr(config, key)!r}; leave it out")


def _llama_questions(config: SuiteConfig, data: Path) -> Suite:
    _only(config, "llama_questions", "instruction")
    instruction = config.instruction or ""
    asked = questions.llama_questions(data)
    return _of_questions(asked, lambda question: _asked(Audio(path=question.audio), Text(instruction)), instruction)


def _of_questions(
    asked: Sequence[Question], turns: Callable[[Question], tuple[Turn, ...]], instruction: str, split: str | None = None
) -> Suite:
    by_id = {question.id: question for question in asked}
    items = [Item(question.id, turns(question), question.answer, question.task) for question in asked]
    rules = sorted({question.rule for question in asked})
    assert len(rules) < 2, rules
    free = rules in ([], ["contains+aliases/1"])
    return Suite(
        "",
        "accuracy",
        tuple(items),
        {"rule": rules[0] if rules else None, "instruction": instruction, "split": split},
        lambda item, reply: questions.is_right(by_id[item.id], reply),
        {question.id: question.question for question in asked},
        chooses=None if free else lambda reply: questions.letter(asked[0].rule, reply) is not None,
        form="either" if rules == ["contains+aliases/1"] else "text",
        groups="tasks",
    )


def _choices(kind: str, config: SuiteConfig, data: Path) -> Suite:
    if kind == "voicebench":
        _only(config, kind, "split", "instruction")
        if config.split is None:
            raise BadConfig("suite voicebench: which subset? expected split: sd-qa, openbookqa or mmsu, given none")
        instruction = config.instruction or ""
        path = data / f"{config.split}.jsonl" if data.is_dir() else data
        asked = questions.voicebench(path, config.split)
        return _of_questions(
            asked, lambda question: _asked(Audio(path=question.audio), Text(instruction)), instruction, config.split
        )
    _only(config, kind, "instruction")
    instruction = AIR_BENCH if config.instruction is None else config.instruction
    asked = questions.air_bench_foundation(data / "Foundation_meta.json" if data.is_dir() else data)
    return _of_questions(asked, lambda question: _single_choice(question, instruction), instruction)


def _single_choice(question: Question, instruction: str) -> tuple[Turn, ...]:
    options = "".join(f"\n{mark}. {choice}" for mark, choice in zip(questions.LETTERS, question.choices, strict=False))
    return _asked(Audio(path=question.audio), Text(f"{instruction}{question.question}{options}"))


def _digits(config: SuiteConfig, data: Path) -> Suite:
    _only(config, "digits", "split", "instruction")
    if config.split not in (None, "all", "test"):
        raise BadConfig(f"suite digits: split is {config.split!r}, expected all or test (index 0 to 4)")
    instruction = TASKS["asr"].instruction if config.instruction is None else config.instruction
    items = [
        Item(one.id, _asked(Audio(path=one.path), Text(instruction)), one.word, one.speaker)
        for one in recordings(data).members
        if config.split != "test" or one.index in USUAL_TEST_INDICES
    ]
    protocol = {
        "rule": "digit/1",
        "instruction": instruction,
        "split": "index 0 to 4" if config.split == "test" else "all",
    }
    said = dict(zip((item.id for item in items), ["Which digit is spoken?"] * len(items), strict=True))
    return Suite("", "accuracy", tuple(items), protocol, _is_digit, said, groups="speakers")


def _is_digit(item: Item, reply: str) -> bool:
    """`digit/1`: the reply names one digit, as a word or a figure, however often, and it is the right one."""
    named = {word for word in normalise_en(reply).split() if word in DIGITS}
    return named == {item.reference}


def _normalisers(config: SuiteConfig, usual: Mapping[Language, str], items: Sequence[Item]) -> dict[Language, str]:
    """The protocol of every language that occurs; refuses references in another script, with the item."""
    chosen = {**usual, **(config.normalisers or {})}
    used = {language: chosen[language] for language in sorted({item.language for item in items})}
    for language, protocol in used.items():
        of_language = [item for item in items if item.language == language]
        for item in of_language:
            try:
                error_counts([item.reference], [""], language, protocol)
            except BadRecord as error:
                raise BadRecord(f"item {item.id!r}: {str(error).removeprefix('row 0: ')}") from None
    return used


def _asr(kind: str, config: SuiteConfig, data: Path) -> Suite:
    _only(config, kind, "split", "normalisers", "instruction")
    instruction = TASKS["asr"].instruction if config.instruction is None else config.instruction
    items = [_of_clip(clip, instruction, clip.text) for clip in corpora.ASR[kind](data, config.split)]
    protocol = {"instruction": instruction, "split": config.split}
    return Suite("", "error_rate", tuple(items), protocol | {"normalisers": _normalisers(config, NORMALISERS, items)})


def _of_clip(clip: Clip, instruction: str, reference: str) -> Item:
    turns = _asked(Audio(path=clip.audio), Text(instruction))
    return Item(clip.id, turns, reference, clip.group, clip.language, clip.excerpt)


def _robustness(config: SuiteConfig, data: Path) -> Suite:
    """Sentences as `sentences` or a manifest gives them, once as recorded and once at each level of noise."""
    _only(config, "robustness", "normalisers", "instruction", "noise")
    instruction = TASKS["asr"].instruction if config.instruction is None else config.instruction
    has_table = (data / "transcripts.tsv").is_file()
    clips = corpora.ASR["sentences" if has_table else "asr"](data, None)
    folder = data / (config.noise or NOISE_FOLDER) if data.is_dir() else data.parent / (config.noise or NOISE_FOLDER)
    items = [
        replace(_of_clip(clip, instruction, clip.text), id=f"{clip.id}/{level}", group=level, noise=noise)
        for clip in clips
        for level, noise in levels(clip.id, folder)
    ]
    protocol = {"instruction": instruction, "split": None, "noise": HELD_OUT_NOISE, "levels_db": list(LEVELS_DB)}
    normalisers = _normalisers(config, NORMALISERS, items)
    return Suite("", "error_rate", tuple(items), protocol | {"normalisers": normalisers}, groups="levels")


def _covost2(config: SuiteConfig, data: Path) -> Suite:
    _only(config, "covost2", "split")
    items = [
        replace(
            _of_clip(clip, TRANSLATE[clip.group], clip.translation), language="en" if clip.group == "zh_en" else "zh"
        )
        for clip in corpora.covost2(data, config.split)
    ]
    protocol = {"instruction": TRANSLATE, "split": config.split or "test", "normaliser": "none"}
    return Suite("", "bleu", tuple(items), protocol)


def _seed_tts(config: SuiteConfig, data: Path) -> Suite:
    _only(config, "seed_tts")
    rows = synthesis.read_meta(data / "meta.lst" if data.is_dir() else data)
    languages: set[Language] = {"zh" if is_chinese(row.text) else "en" for row in rows}
    if len(languages) > 1:
        raise BadRecord(f"{data}: expected sentences of one language, given English and Chinese ones; split the list")
    items = [
        Item(row.id, _asked(Text(row.text, aloud=True)), row.text, language=min(languages), prompt=row.prompt)
        for row in rows
    ]
    protocol = {"voice": "the responder's own; the prompt's is not cloned"}
    normalisers = _normalisers(config, synthesis.PROTOCOLS, items)
    return Suite("", "seed_tts", tuple(items), protocol | {"normalisers": normalisers}, form="speech")


def _tri(config: SuiteConfig, data: Path) -> Suite:
    """Picture and spoken question; JSON lines {"id", "image", "audio", "text": the right answer, "question"?}."""
    _only(config, "tri", "instruction")
    path = data / "tri.jsonl" if data.is_dir() else data
    items, said = [], {}
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        unknown = sorted(set(row) - TRI_KEYS)
        if unknown:
            raise BadRecord(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(TRI_KEYS))}")
        image, audio = (path.parent / text_of(row, key, where) for key in ("image", "audio"))
        turns = _asked(Image(path=image), Audio(path=audio), Text(config.instruction or ""))
        items.append(Item(text_of(row, "id", where), turns, text_of(row, "text", where)))
        said[items[-1].id] = text_of(row, "question", where) if "question" in row else ""
    protocol = {"rule": "contains+aliases/1", "instruction": config.instruction or ""}
    return Suite(
        "", "accuracy", tuple(items), protocol, lambda item, reply: questions.score(item.reference, reply), said
    )
