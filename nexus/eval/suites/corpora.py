"""Published speech corpora as lists of clips: one function per layout, each refusing a folder of another one.

Only lists are read here, no sound. Splits are those that the corpora name. Sources: openslr.org/12 (LibriSpeech),
/33 (AISHELL-1), AISHELL-2's evaluation sets, WenetSpeech.json 1.0, google/fleurs and Common Voice tables, CoVoST 2.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nexus.errors import BadRecord
from nexus.eval.suites.rows import read_jsonl, read_lines, read_list, read_table, text_of
from nexus.text import is_chinese

Language = Literal["en", "zh"]
FLEURS_COLUMNS = ("id", "file_name", "raw_transcription", "transcription", "characters", "num_samples", "gender")
COVOST_DIRECTIONS = {"zh_en": "covost_v2.zh-CN_en", "en_zh": "covost_v2.en_zh-CN"}
# The last five are what `nexus synth testset` writes beside them; scores do not depend on them.
CLIP_KEYS = {"id", "audio", "text", "language", "scenario", "duration", "speaker", "snr", "source", "licence"}


@dataclass(frozen=True)
class Clip:
    """A recording and what is said in it; `group` is its scenario or part. `excerpt` (begin, end) in seconds where
    the recording is longer than what is meant; `translation` where there is one."""

    id: str
    audio: Path
    text: str
    language: Language
    group: str = ""
    excerpt: tuple[float, float] | None = None
    translation: str = ""


def librispeech(root: Path, split: str | None) -> list[Clip]:
    """Every `*.trans.txt` below the folder beside its `.flac`; `split` is a part such as test-clean."""
    lists = sorted(path for path in root.rglob("*.trans.txt") if split is None or split in path.parts)
    _expect(lists, root, "LibriSpeech: *.trans.txt beside .flac", split)
    clips = []
    for path in lists:
        part = next((name for name in path.parts if name.split("-")[0] in ("dev", "test", "train")), "")
        clips += [Clip(key, path.parent / f"{key}.flac", text, "en", part) for key, text in read_list(path)]
    return clips


def aishell1(root: Path, split: str | None) -> list[Clip]:
    """`transcript/aishell_transcript_v0.8.txt` and `wav/SPLIT/SPEAKER/ID.wav`; the test split unless named."""
    path = root / "transcript" / "aishell_transcript_v0.8.txt"
    folder = root / "wav" / (split or "test")
    _expect([path] if path.is_file() else [], root, "AISHELL-1: transcript/aishell_transcript_v0.8.txt", None)
    sounds = {sound.stem: sound for sound in sorted(folder.glob("*/*.wav"))}
    _expect(list(sounds.values()), root, "AISHELL-1: wav/SPLIT/SPEAKER/*.wav", split or "test")
    texts = dict(read_list(path))
    silent = [key for key in sounds if key not in texts]
    # The corpus leaves some clips untranscribed in its training part; its test part is complete.
    if silent:
        raise BadRecord(f"{path}: no transcript of {silent[0]} ({len(silent)} such); remove these sounds or add them")
    return [Clip(key, sound, "".join(texts[key].split()), "zh") for key, sound in sounds.items()]


def aishell2(root: Path, split: str | None) -> list[Clip]:
    """Every folder with `wav.scp` and `trans.txt` (iOS, Android, Mic), the test split unless named; a group each."""
    lists = sorted(path for path in root.rglob("trans.txt") if (path.parent / "wav.scp").is_file())
    splits = {"dev", "test", "train"}
    chosen = [path for path in lists if not splits & set(path.parts) or (split or "test") in path.parts]
    _expect(chosen, root, "AISHELL-2: wav.scp and trans.txt in CHANNEL/SPLIT", split or "test")
    clips = []
    for path in chosen:
        sounds = dict(read_list(path.parent / "wav.scp"))
        group = next((name for name in reversed(path.parent.parts) if name not in splits), "")
        for key, text in read_list(path):
            if key not in sounds:
                raise BadRecord(f"{path.parent / 'wav.scp'}: no sound for {key} of {path.name}; add or remove it")
            clips.append(Clip(f"{group}/{key}", path.parent / sounds[key], "".join(text.split()), "zh", group))
    return clips


def wenetspeech(root: Path, split: str | None) -> list[Clip]:
    """The segments of `WenetSpeech.json` that belong to a subset, TEST_NET unless named (TEST_MEETING, DEV)."""
    path, subset = root / "WenetSpeech.json", split or "TEST_NET"
    _expect([path] if path.is_file() else [], root, "WenetSpeech: WenetSpeech.json", None)
    try:
        audios = json.loads("\n".join(read_lines(path)))["audios"]
        clips = [
            Clip(
                _string(segment["sid"]),
                root / _string(audio["path"]),
                _string(segment["text"]),
                "zh",
                subset,
                (float(segment["begin_time"]), float(segment["end_time"])),
            )
            for audio in audios
            for segment in audio["segments"]
            if subset in segment.get("subsets", ())
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadRecord(
            f"{path}: expected audios[].path and segments[].(sid, begin_time, end_time, text, subsets), given "
            f"something else ({error!r}); is it WenetSpeech 1.0?"
        ) from None
    _expect(clips, path, "WenetSpeech: segments of a subset", subset)
    return clips


def fleurs(root: Path, split: str | None) -> list[Clip]:
    """`SPLIT.tsv` (no header) and `audio/SPLIT/*.wav` of one language of google/fleurs; the test split unless named.

    The raw transcription is taken. Several speakers read one sentence, so a clip's id is the name of its sound.
    """
    name = split or "test"
    path = root / f"{name}.tsv"
    _expect([path] if path.is_file() else [], root, "FLEURS: SPLIT.tsv and audio/SPLIT", name)
    rows = read_table(path, FLEURS_COLUMNS)
    return [_by_script(row["file_name"], root / "audio" / name, row["raw_transcription"]) for _, row in rows]


def common_voice(root: Path, split: str | None) -> list[Clip]:
    """`SPLIT.tsv` with columns path and sentence, sounds in `clips/`; the test split unless named."""
    path = root / f"{split or 'test'}.tsv"
    _expect([path] if path.is_file() else [], root, "Common Voice: SPLIT.tsv and clips", split or "test")
    return [
        _by_script(_cell(row, "path", path, number), root / "clips", _cell(row, "sentence", path, number))
        for number, row in read_table(path)
    ]


def sentences(root: Path, split: str | None) -> list[Clip]:
    """`transcripts.tsv` with columns file and text, sounds beside it."""
    path = root / "transcripts.tsv"
    _no_split(split, "a folder with transcripts.tsv")
    _expect([path] if path.is_file() else [], root, "transcripts.tsv and the sounds it names", None)
    return [
        _by_script(_cell(row, "file", path, number), root, _cell(row, "text", path, number))
        for number, row in read_table(path)
    ]


def manifest(path: Path, split: str | None) -> list[Clip]:
    """JSON lines {"id", "audio", "text", "language"?, "scenario"?}: Nexus-audio, or any list of clips.

    Paths are relative to the file. Without a language the script of the text decides.
    """
    _no_split(split, "a manifest")
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
        if len(found) != 1:
            raise BadRecord(f"{path}: expected one .jsonl in this folder, found {len(found)}; name the file")
        path = found[0]
    clips = []
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        unknown = sorted(set(row) - CLIP_KEYS)
        if unknown:
            raise BadRecord(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(CLIP_KEYS))}")
        text = text_of(row, "text", where)
        language = text_of(row, "language", where) if row.get("language") is not None else _language(text)
        if language not in ("en", "zh"):
            raise BadRecord(
                f"{where}: language: expected 'en' or 'zh', given {language!r}; other ones have no protocol"
            )
        spoken: Language = "zh" if language == "zh" else "en"
        group = text_of(row, "scenario", where) if row.get("scenario") is not None else ""
        sound = path.parent / text_of(row, "audio", where)
        clips.append(Clip(text_of(row, "id", where), sound, text, spoken, group))
    return clips


def covost2(root: Path, split: str | None) -> list[Clip]:
    """`covost_v2.{en_zh-CN,zh-CN_en}.SPLIT.tsv` anywhere below the folder, with columns path, sentence, translation
    and the sounds in `clips/` beside it. The group is the direction, en_zh or zh_en; the test split unless named."""
    clips: list[Clip] = []
    for direction, stem in COVOST_DIRECTIONS.items():
        for path in sorted(root.rglob(f"{stem}.{split or 'test'}.tsv")):
            for number, row in read_table(path):
                name, said, translated = (_cell(row, key, path, number) for key in ("path", "sentence", "translation"))
                language: Language = "zh" if direction == "zh_en" else "en"
                key, sound = f"{direction}/{Path(name).stem}", path.parent / "clips" / name
                clips.append(Clip(key, sound, said, language, direction, translation=translated))
    _expect(clips, root, "CoVoST 2: covost_v2.en_zh-CN.SPLIT.tsv or covost_v2.zh-CN_en.SPLIT.tsv", split or "test")
    return clips


ASR: dict[str, Callable[[Path, str | None], list[Clip]]] = {
    "librispeech": librispeech,
    "aishell1": aishell1,
    "aishell2": aishell2,
    "wenetspeech": wenetspeech,
    "fleurs": fleurs,
    "common_voice": common_voice,
    "sentences": sentences,
    "nexus_audio": manifest,
    "asr": manifest,
}


def _expect(found: Any, root: Path, layout: str, split: str | None) -> None:
    if not found:
        part = "" if split is None else f" of split {split!r}"
        what = "is no folder" if not root.exists() else f"holds nothing{part} in the layout expected"
        raise BadRecord(f"{root}: {what} ({layout}); is it the folder of this suite?")


def _no_split(split: str | None, what: str) -> None:
    if split is not None:
        raise BadRecord(f"split {split!r}: {what} has no splits; leave it out")


def _cell(row: dict[str, str], column: str, path: Path, number: int) -> str:
    if column not in row:
        raise BadRecord(
            f"{path}:{number}: no column {column!r}, given {', '.join(row)}; is it the table of this suite?"
        )
    return row[column]


def _by_script(name: str, folder: Path, text: str) -> Clip:
    return Clip(Path(name).stem, folder / name, text, _language(text))


def _language(text: str) -> Language:
    return "zh" if is_chinese(text) else "en"


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
