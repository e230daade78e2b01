"""One line of a user's file to a Sample, and back: the row formats of the field, told apart by their keys.

The canonical row, which `write_record` writes, is one JSON object a line:

    {"id": ..., "task": ..., "messages": [{"role": ..., "content": [PART, ...]}, ...], "meta": {...}}

PART is {"type": "text", "text": T}, with "aloud": true for words to be spoken, or {"type": "image" | "audio" | "video",
"path": FILE}. Sound in an assistant's turn is what the model shall say. Read as well: ms-swift (`messages` with marks,
`query` and `response`), LLaMA-Factory and ShareGPT (`conversations`), alpaca (`instruction`), OpenAI content parts.
Nothing here opens a medium, and nothing is fetched.
"""

import base64
import binascii
import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from nexus.errors import BadRecord
from nexus.types import Audio, Image, MediaKind, Part, Role, Sample, Text, Turn, Video

TASK = "chat"  # of a row that names none
KINDS: tuple[MediaKind, ...] = get_args(MediaKind)
ROLES: tuple[Role, ...] = get_args(Role)
# What other projects call the three roles. Roles of tools are not among them: nothing here renders tools.
ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
FORMATS = ("messages", "conversations", "conversation", "query", "instruction")  # each row has one of these keys
OF_FORMAT = {  # the other keys with which a format makes its turns
    "messages": (),
    "conversations": ("system",),
    "conversation": ("system",),
    "query": ("response", "history", "system"),
    "instruction": ("input", "output", "history", "system"),
}
MEDIA_KEYS = {key: kind for kind in KINDS for key in (kind, f"{kind}s")}
# They would change what a row teaches, and are not understood here.
REFUSED = ("tools", "objects", "rejected_response", "rejected_messages", "rejected", "chosen", "label", "functions")
MARK = re.compile(r"<(image|audio|video)>")
MAX_LINE_BYTES = 64 * 2**20

Keep = Callable[[MediaKind, bytes, str], Path]  # (kind, file's bytes, its ending) -> where it was written


def read_record(line: str, where: str, root: Path, keep: Keep | None = None) -> Sample:
    """The row of one line. `where` ("train.jsonl:812") begins every refusal and names a row without an id.

    Paths are relative to `root`, the file's folder, and stay inside it; a file elsewhere is named by its absolute path.
    Media that the row itself carries in base64 (no row is longer than 64 MiB) are handed to `keep`; where there is
    none, such a row is refused. Keys that mean nothing here are kept in `meta`. Raises BadRecord.
    """
    return _Reader(where, root, keep).sample(line)


def write_record(sample: Sample, root: Path) -> str:
    """The canonical row of a sample without the line's end; media inside `root` are named relative to it.

    Raises BadRecord for media that are no files.
    """
    messages = [
        {"role": turn.role, "content": [_written(part, sample.id, root) for part in turn.parts]}
        for turn in sample.turns
    ]
    row: dict[str, Any] = {"id": sample.id, "task": sample.task, "messages": messages}
    if sample.meta:
        row["meta"] = dict(sample.meta)
    return json.dumps(row, ensure_ascii=False)


def _written(part: Part, name: str, root: Path) -> dict[str, Any]:
    match part:
        case Text(text, aloud=True):
            return {"type": "text", "text": text, "aloud": True}
        case Text(text):
            return {"type": "text", "text": text}
        case Audio(path=Path() as path) | Image(path=Path() as path) | Video(path=Path() as path):
            inside = path.is_relative_to(root)
            return {"type": _kind(part), "path": (path.relative_to(root) if inside else path.absolute()).as_posix()}
    raise BadRecord(f"{name}: {_kind(part)} in memory, expected a file; write it to one and name that")


def _kind(part: Part) -> str:
    return type(part).__name__.lower()


def media_files(sample: Sample) -> Iterable[tuple[MediaKind, Path]]:
    """Kind and path of every medium of a sample, turn by turn."""
    for turn in sample.turns:
        for part in turn.parts:
            if not isinstance(part, Text) and part.path is not None:
                kind: MediaKind = (
                    "audio" if isinstance(part, Audio) else "image" if isinstance(part, Image) else "video"
                )
                yield kind, part.path


def with_media(sample: Sample, paths: Iterable[Path]) -> Sample:
    """The sample with its media, in the order of `media_files`, at other paths."""
    each = iter(paths)
    turns = tuple(
        Turn(turn.role, tuple(p if isinstance(p, Text) else type(p)(path=next(each)) for p in turn.parts))
        for turn in sample.turns
    )
    return Sample(sample.id, sample.task, turns, sample.meta)


class _Reader:
    """Reads one line; knows where it stands, for messages."""

    def __init__(self, where: str, root: Path, keep: Keep | None) -> None:
        self.where, self.root, self.keep = where, root, keep

    def refuse(self, message: str) -> NoReturn:
        raise BadRecord(f"{self.where}: {message}") from None

    def sample(self, line: str) -> Sample:
        row = self.parsed(line)
        given = [key for key in FORMATS if key in row]
        if len(given) != 1:
            found = f"found {' and '.join(given)}" if given else f"found {_short(', '.join(row) or 'no key')}"
            self.refuse(f"expected one of the keys {', '.join(FORMATS)}, {found}; see docs/data.md")
        media = self.media(row)
        turns = self.turns(given[0], row, media)
        self.check_turns(turns)
        name = row.get("id", self.where)
        if not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
            self.refuse(f"id: expected a text or a number, given {_short(name)}; correct it")
        task = row.get("task", TASK)
        if not isinstance(task, str) or not task:
            self.refuse(f"task: expected a word such as {TASK!r}, given {_short(task)}; correct it")
        return Sample(str(name), task, tuple(turns), self.meta(given[0], row))

    def parsed(self, line: str) -> dict[str, Any]:
        if len(line) > MAX_LINE_BYTES:
            self.refuse(f"the line has {len(line):,} characters, the limit is {MAX_LINE_BYTES:,}; put media into files")
        try:
            row = json.loads(line, parse_constant=_no_number, object_pairs_hook=without_twins)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except RecursionError:
            self.refuse("brackets are nested too deeply to be read, expected a flat row; write one object a line")
        except ValueError as error:
            self.refuse(f"is no JSON: {error}; write one object a line")
        if not isinstance(row, dict):
            self.refuse(f"expected an object, given {type(row).__name__}; write one object a line")
        return row

    def meta(self, format: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """What is not understood and changes nothing, under its own name."""
        known = {format, *OF_FORMAT[format], *MEDIA_KEYS, "id", "task", "meta"}
        rest = {key: value for key, value in row.items() if key not in known}
        for key in rest:
            if key in REFUSED:
                self.refuse(f"key {key!r} changes what a row teaches and is not known here; remove it, or the row")
            meant = difflib.get_close_matches(key, [*MEDIA_KEYS, *OF_FORMAT[format]], n=1, cutoff=0.8)
            if meant:
                self.refuse(f"unknown key {key!r}, did you mean {meant[0]!r}? What is your own belongs into 'meta'")
        meta = row.get("meta", {})
        if not isinstance(meta, dict):
            self.refuse(f"meta: expected an object, given {_short(meta)}; correct it")
        twice = sorted(set(meta) & set(rest))
        if twice:
            self.refuse(f"key {twice[0]!r} stands in the row and in its meta; remove one")
        return {**meta, **rest}

    def media(self, row: Mapping[str, Any]) -> dict[MediaKind, list[Part]]:
        """The lists of media beside the turns, by kind."""
        found: dict[MediaKind, list[Part]] = {kind: [] for kind in KINDS}
        for key, kind in MEDIA_KEYS.items():
            value = row.get(key)
            if value is None:
                continue
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                found[kind].append(self.medium(kind, item, f"{key} {index}"))
        return found

    def turns(self, format: str, row: Mapping[str, Any], media: dict[MediaKind, list[Part]]) -> list[Turn]:
        messages = list(self.messages(format, row))
        self.check_marks(messages, media)
        unmarked = [part for kind in KINDS if not _marks(messages, kind) for part in media[kind]]
        queues: dict[str, Any] = {kind: iter(media[kind]) for kind in KINDS}
        turns = []
        for index, (role, content) in enumerate(messages):
            parts = self.content(content, f"turn {index}", queues)
            if unmarked and role == "user":  # ms-swift's rule for rows whose texts carry no marks
                parts, unmarked = [*unmarked, *parts], []
            turns.append(Turn(role, tuple(parts)))
        if unmarked:
            self.refuse("media are given, but no turn is the user's; add one, or mark their places")
        return turns

    def check_marks(self, messages: Sequence[tuple[Role, Any]], media: Mapping[MediaKind, Sequence[Part]]) -> None:
        for kind in KINDS:
            marks, given = _marks(messages, kind), len(media[kind])
            if marks not in (0, given):
                self.refuse(
                    f"{marks} <{kind}> in the texts, but {given} given under {kind}s; name one file per mark, or write "
                    "the turn as content parts, whose texts hold no marks"
                )

    def messages(self, format: str, row: Mapping[str, Any]) -> Iterable[tuple[Role, Any]]:
        """Role and content (a text, or a list of parts) of every turn."""
        system = row.get("system")
        if system and format != "messages":
            yield "system", self.text(system, "system")
        match format:
            case "messages":
                yield from self.listed(row, format, ("role",), ("content",))
            case "conversations":
                yield from self.listed(row, format, ("from", "role"), ("value", "content"))
            case "conversation":
                yield from self.pairs(self.items(row[format], format), ("human", "assistant"), format)
            case "query":
                yield from self.history(row)
                yield "user", self.text(row[format], format)
                if row.get("response") is not None:
                    yield "assistant", self.text(row["response"], "response")
            case "instruction":
                yield from self.history(row)
                asked = [self.text(row[key], key) for key in (format, "input") if row.get(key)]
                yield "user", "\n".join(asked)
                if "output" not in row:
                    self.refuse("output is missing, expected what is answered; add it")
                yield "assistant", self.text(row["output"], "output")

    def listed(
        self, row: Mapping[str, Any], format: str, roles: tuple[str, ...], contents: tuple[str, ...]
    ) -> Iterable[tuple[Role, Any]]:
        for index, message in enumerate(self.items(row[format], format)):
            here = f"turn {index}"
            if not isinstance(message, dict):
                self.refuse(f"{here}: expected an object with {roles[0]} and {contents[0]}, given {_short(message)}")
            unknown = sorted(message.keys() - {*roles, *contents})
            if unknown:
                self.refuse(f"{here}: unknown key {unknown[0]!r}, expected {roles[0]} and {contents[0]}; remove it")
            named = next((message[key] for key in roles if key in message), None)
            role = ROLE_NAMES.get(named) if isinstance(named, str) else None
            if role is None:
                self.refuse(f"{here}: {roles[0]}: expected one of {', '.join(ROLE_NAMES)}, given {_short(named)}")
            content = next((message[key] for key in contents if key in message), None)
            if not isinstance(content, (str, list)):
                self.refuse(f"{here}: {contents[0]}: expected a text or a list of parts, given {_short(content)}")
            yield role, content

    def pairs(self, items: Sequence[Any], keys: tuple[str, str], name: str) -> Iterable[tuple[Role, str]]:
        for index, item in enumerate(items):
            both = [item.get(key) for key in keys] if isinstance(item, dict) else item
            if not isinstance(both, list) or len(both) != 2 or not all(isinstance(text, str) for text in both):
                self.refuse(f"{name} {index}: expected what {keys[0]} and {keys[1]} say, given {_short(item)}")
            yield "user", both[0]
            yield "assistant", both[1]

    def history(self, row: Mapping[str, Any]) -> Iterable[tuple[Role, str]]:
        return self.pairs(self.items(row.get("history") or [], "history"), ("user", "assistant"), "history")

    def items(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            self.refuse(f"{name}: expected a list, given {_short(value)}; correct it")
        return value

    def text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            self.refuse(f"{name}: expected a text, given {_short(value)}; correct it")
        return value

    def content(self, content: str | list[Any], here: str, queues: Mapping[str, Any]) -> list[Part]:
        if isinstance(content, list):
            return [self.part(part, f"{here} part {number}") for number, part in enumerate(content)]
        parts: list[Part] = []
        for number, piece in enumerate(MARK.split(content)):
            if number % 2:
                parts.append(next(queues[piece]))
            elif piece:
                parts.append(Text(piece))
        return parts

    def part(self, part: Any, here: str) -> Part:
        """A content part: ours, OpenAI's, vLLM's, or that of a chat template of transformers."""
        kind = part.get("type") if isinstance(part, dict) else None
        rest = {key: value for key, value in part.items() if key != "type"} if isinstance(part, dict) else {}
        match kind:
            case "text":
                aloud = rest.pop("aloud", False)
                if rest.keys() != {"text"} or not isinstance(rest["text"], str) or not isinstance(aloud, bool):
                    self.refuse(f"{here}: expected text, and aloud (true or false) at will, given {_short(part)}")
                return Text(rest["text"], aloud)
            case "input_audio":
                return self.medium("audio", self.only(rest, ("input_audio",), part, here), here)
            case "image_url" | "audio_url" | "video_url":
                kind = str(kind).removesuffix("_url")
                return self.medium(kind, self.only(rest, (f"{kind}_url",), part, here), here)  # type: ignore[arg-type]
            case "image" | "audio" | "video":
                return self.medium(kind, self.only(rest, ("path", "url", kind), part, here), here)
        known = ("text", *KINDS, *(f"{kind}_url" for kind in KINDS), "input_audio")
        self.refuse(f"{here}: expected a type of {', '.join(known)}, given {_short(part if kind is None else kind)}")

    def only(self, rest: Mapping[str, Any], keys: Sequence[str], part: Any, here: str) -> Any:
        if len(rest) != 1 or next(iter(rest)) not in keys:
            self.refuse(f"{here}: expected a file under {' or '.join(keys)} and nothing else, given {_short(part)}")
        return next(iter(rest.values()))

    def medium(self, kind: MediaKind, value: Any, here: str) -> Part:
        """A file given by its name, {"path"}, {"url"}, OpenAI's {"data", "format"}, or a data: URL."""
        ending = ""
        if isinstance(value, dict):
            if value.keys() == {"data", "format"}:
                ending, value = str(value["format"]), f"data:;base64,{value['data']}"
            elif len(value.keys() - {"detail"}) == 1 and ("path" in value or "url" in value):
                value = value.get("path", value.get("url"))  # `detail` is OpenAI's hint on the price of a picture
        if not isinstance(value, str) or not value:
            self.refuse(f"{here}: expected the name of a file, given {_short(value)}; name one")
        path = self.embedded(kind, value, ending, here) if value.startswith("data:") else self.path(value, here)
        match kind:
            case "audio":
                return Audio(path=path)
            case "image":
                return Image(path=path)
            case _:
                return Video(path=path)

    def path(self, name: str, here: str) -> Path:
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", name)
        if scheme:
            what = (
                "nothing is fetched; download it" if scheme[1].lower().startswith("http") else "expected a file's name"
            )
            self.refuse(f"{here}: {_short(name)} is an address of {scheme[1]}: {what} and name the file")
        if not name.isprintable():
            self.refuse(f"{here}: {_short(name)} holds characters that no file's name should; rename the file")
        if os.path.isabs(name):
            return Path(name)
        inside = os.path.normpath(name)
        if inside == ".." or inside.startswith("../"):
            self.refuse(
                f"{here}: {_short(name)} leaves the folder of the file, expected a path inside it; name what lies "
                "elsewhere by its absolute path"
            )
        return self.root / inside

    def embedded(self, kind: MediaKind, url: str, ending: str, here: str) -> Path:
        if self.keep is None:
            self.refuse(f"{here}: the {kind} stands in the row itself, expected a file; run `nexus data import` first")
        head, comma, data = url.partition(",")
        if not comma or not head.endswith(";base64"):
            self.refuse(f"{here}: expected data:TYPE;base64,DATA, given {_short(url)}; encode it in base64")
        try:
            content = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            self.refuse(f"{here}: its data is no base64; encode it again")
        ending = ending or head.removeprefix("data:").removesuffix(";base64").rpartition("/")[2].partition(";")[0]
        return self.keep(kind, content, re.sub(r"[^a-z0-9]", "", ending.lower())[:8])

    def check_turns(self, turns: Sequence[Turn]) -> None:
        """What each role may hold: the model is shown media by the user, and answers in text and sound."""
        if not turns:
            self.refuse("expected at least one turn, given none; remove the row")
        for index, turn in enumerate(turns):
            kinds = [_kind(part) for part in turn.parts if not isinstance(part, Text)]
            if not turn.parts:
                self.refuse(f"turn {index}: holds nothing, expected a text or a medium; fill or remove it")
            match turn.role:
                case "system" if index or kinds:
                    self.refuse(
                        f"turn {index}: a system turn holds text and comes first, given {kinds or 'a later one'}"
                    )
                case "assistant" if any(kind != "audio" for kind in kinds) or len(kinds) > 1:
                    self.refuse(f"turn {index}: an answer holds text and at most one sound, given {', '.join(kinds)}")
                case "assistant" if kinds and not _has_words(turns, index):
                    self.refuse(
                        f"turn {index}: an answer of sound needs its words, as text before it or as the user's text "
                        "marked aloud; add them"
                    )


def _has_words(turns: Sequence[Turn], index: int) -> bool:
    """Whether it is written what the sound of an answer says: in the answer, or to be read aloud just before it."""
    before = turns[index - 1].parts if index else ()
    own = any(isinstance(part, Text) for part in turns[index].parts)
    return own or any(isinstance(part, Text) and part.aloud for part in before)


def _marks(messages: Iterable[tuple[Role, Any]], kind: MediaKind) -> int:
    return sum(content.count(f"<{kind}>") for _, content in messages if isinstance(content, str))


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two equal keys the library would drop the first without a word."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return made


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return ascii(text if len(text) <= 60 else text[:57] + "...")
