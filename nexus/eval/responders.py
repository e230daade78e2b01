"""Whoever is examined: a model folder, recorded answers, or a server that speaks OpenAI's chat protocol.

One protocol: samples in, one `Answer` for each out, many at a time. What has no answer comes back empty and is counted
by the suite; nothing here knows a reference.
"""

import base64
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from nexus.engines.json_http import JsonServer
from nexus.errors import BadConfig, BadMedia, BadRecord, NexusError
from nexus.eval.suites.rows import excerpt, read_jsonl, text_of
from nexus.media import load, load_audio, wav_bytes
from nexus.sight import png_bytes
from nexus.types import Audio, Image, Part, Sample, Text, Turn, Video

if TYPE_CHECKING:
    from nexus.respond import OmniResponder

MAX_TOKENS = 256
ROWS = 16  # conversations under way at a time
VOICE = "alloy"  # servers want the name of a voice where sound is asked for
TIMEOUT_SECONDS = 300.0  # for each wait on a server; a long answer is made before its first byte is sent
MAX_REPLY_BYTES = 256 * 2**20
KINDS = "a model folder, openai:URL#MODEL or answers:FILE"


@dataclass(frozen=True, eq=False)
class Answer:
    """What came back: words, sound (loaded, or still a file), or neither, which is a missing answer. `complete` is
    False where it was stopped at a limit."""

    text: str | None = None
    audio: Audio | None = None
    complete: bool = True

    @property
    def is_missing(self) -> bool:
        """Whether there is no answer at all; an empty text is one."""
        return self.text is None and self.audio is None


@runtime_checkable
class Responder(Protocol):
    """`identity` says what answers and how it decodes: JSON values that are equal for equal answers."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def check(self, ids: Collection[str]) -> None:
        """Refuse a suite of these items before any is asked."""
        ...

    def answer(self, samples: Sequence[Sample], speak: bool) -> list[Answer]:
        """One answer per sample, in order, with sound where `speak` asks for it."""
        ...


def responder_of(
    spec: str, *, rows: int = ROWS, max_tokens: int = MAX_TOKENS, device: str = "cpu", token: str | None = None
) -> Responder:
    """The responder that a command line names. Raises BadConfig, BadCheckpoint or BadRecord.

    `rows` conversations are answered at a time. `token` is sent to the server as `Authorization: Bearer`.
    """
    if rows < 1 or max_tokens < 1:
        raise BadConfig(f"rows and max_tokens: expected at least 1, given {rows} and {max_tokens}")
    kind, _, rest = spec.partition(":")
    match kind:
        case "answers":
            return RecordedAnswers(Path(rest))
        case "openai":
            return ChatEndpoint(*address_of(rest), token=token, max_tokens=max_tokens, rows=rows)
        case _ if Path(spec).is_dir():
            return ModelFolder(Path(spec), device, max_tokens, rows)
        case _:
            raise BadConfig(f"responder {spec!r}: no such folder; expected {KINDS}")


class ModelFolder:
    """Our own model, loaded once; greedy. Raises BadCheckpoint or BadConfig."""

    def __init__(self, folder: Path, device: str = "cpu", max_tokens: int = MAX_TOKENS, rows: int = ROWS) -> None:
        from nexus.respond import load as load_responder

        self._responder: OmniResponder = load_responder(folder, device)
        self._max_tokens, self._rows, self._device = max_tokens, rows, device
        self._weights = _digest_of_files(folder)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Digest of the folder's files and how it decodes."""
        decoding = {"method": "greedy", "max_tokens": self._max_tokens, "rows": self._rows, "device": self._device}
        return {"kind": "model", "fingerprint": self._weights, "decoding": decoding}

    def check(self, ids: Collection[str]) -> None:
        """Takes any suite; what the model has no organ for is refused with the sample that needs it."""

    def answer(self, samples: Sequence[Sample], speak: bool) -> list[Answer]:
        """Answers of one batch. Raises BadRecord where a sample needs an organ that the model lacks."""
        if speak and self._responder.model.voice is None:
            raise BadConfig("this model has no voice, and the suite asks for speech; leave out the recogniser")
        conversations = [sample.turns for sample in samples]
        try:
            replies = self._responder.answer_many(conversations, speak, self._max_tokens, rows=self._rows)
        except BadMedia as error:
            raise BadMedia(f"among items {samples[0].id} to {samples[-1].id}: {error}") from None
        return [
            Answer(
                reply.text,
                None if reply.pcm is None else Audio(samples=reply.pcm, rate_hz=self._responder.rate_hz),
                reply.complete,
            )
            for reply in replies
        ]


class RecordedAnswers:
    """Answers from a JSONL file of rows {"id", "text"?, "audio"?, "complete"?}; audio paths are relative to the file.

    Raises BadRecord with file and line for what is no such row, a repeated id, a row without text and audio, and sound
    that is not there; and for answers to no item of the suite.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._answers: dict[str, Answer] = {}
        self._lines: dict[str, int] = {}
        digest = hashlib.sha256()
        for number, row in read_jsonl(path):
            where = f"{path}:{number}"
            key = text_of(row, "id", where)
            if key in self._answers:
                raise BadRecord(f"{where}: id {key!r} stands in line {self._lines[key]} already; keep one of the two")
            self._answers[key], self._lines[key] = self._answer(row, where), number
            sound = self._answers[key].audio
            digest.update(json.dumps(row, sort_keys=True).encode())
            if sound is not None and sound.path is not None:
                digest.update(sound.path.read_bytes())
        if not self._answers:
            raise BadRecord(f"{path}: holds no answers; expected a JSON object with id and text or audio in each line")
        self._digest = digest.hexdigest()[:16]

    def _answer(self, row: Mapping[str, Any], where: str) -> Answer:
        unknown = sorted(set(row) - {"id", "text", "audio", "complete"})
        if unknown:
            raise BadRecord(f"{where}: unknown key {unknown[0]!r}; known are id, text, audio, complete")
        text = text_of(row, "text", where) if row.get("text") is not None else None
        name = text_of(row, "audio", where) if row.get("audio") is not None else None
        if text is None and name is None:
            raise BadRecord(f"{where}: expected a text or an audio, given neither; leave the row out for no answer")
        if not isinstance(row.get("complete", True), bool):
            raise BadRecord(f"{where}: complete: expected true or false, given {row['complete']!r}")
        sound = None
        if name is not None:
            sound = Audio(path=self._path.parent / name)
            if not (self._path.parent / name).is_file():
                raise BadRecord(
                    f"{where}: no sound {self._path.parent / name}; paths are relative to the file's folder"
                )
        return Answer(text, sound, row.get("complete", True))

    @property
    def identity(self) -> Mapping[str, Any]:
        """Digest of rows and sounds, wherever they lie."""
        return {"kind": "answers", "fingerprint": self._digest, "decoding": None}

    def check(self, ids: Collection[str]) -> None:
        """Refuse answers to items that the suite does not have: they were made for another one."""
        unknown = sorted(set(self._answers) - set(ids), key=self._lines.__getitem__)
        if unknown:
            raise BadRecord(
                f"{self._path}:{self._lines[unknown[0]]}: no item {unknown[0]!r} in this suite of {len(ids)} "
                f"({len(unknown)} such answers); are these answers to another suite?"
            )

    def answer(self, samples: Sequence[Sample], speak: bool) -> list[Answer]:
        """What was recorded, sound included whether asked for or not."""
        return [self._answers.get(sample.id, Answer()) for sample in samples]


class ChatEndpoint:
    """A model behind an OpenAI-compatible address (`/chat/completions`), asked `rows` times at once.

    Sound goes as wav at 16 kHz (`input_audio`), pictures as PNG (`image_url`), films as the file they are (`video_url`,
    as vLLM takes them); spoken answers are asked for as wav. Raises NexusError with the address for every failure.
    """

    def __init__(
        self, url: str, model: str, *, token: str | None = None, max_tokens: int = MAX_TOKENS, rows: int = ROWS
    ) -> None:
        self._server, self._model = JsonServer(url, token, TIMEOUT_SECONDS, MAX_REPLY_BYTES), model
        self._rows = rows
        self._decoding = {"temperature": 0, "seed": 0, "max_tokens": max_tokens}

    @property
    def identity(self) -> Mapping[str, Any]:
        """Address and model as named: the weights behind them cannot be seen from here."""
        decoding = {**self._decoding, "sound": "wav 16 kHz", "voice": VOICE}
        return {"kind": "openai", "url": self._server.url, "model": self._model, "decoding": decoding}

    def check(self, ids: Collection[str]) -> None:
        """Takes any suite."""

    def answer(self, samples: Sequence[Sample], speak: bool) -> list[Answer]:
        """Answers in the order of samples; the first failed request raises when those under way have ended."""
        with ThreadPoolExecutor(self._rows) as pool:
            try:
                return list(pool.map(lambda sample: self._ask(sample, speak), samples))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def say(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """The `message` of the first choice, and `complete` beside it: False where a limit stopped it."""
        reply = self._server.ask(
            "/chat/completions", {"model": self._model, "messages": messages, **self._decoding, **more}
        )
        choice = (reply.get("choices") or [None])[0] if isinstance(reply, dict) else None
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            raise NexusError(
                f"{self._server.url}/chat/completions: expected choices[0].message, given "
                f"{excerpt(json.dumps(reply))}; is this an address of chat completions?"
            )
        return {**choice["message"], "complete": choice.get("finish_reason") != "length"}

    def _ask(self, sample: Sample, speak: bool) -> Answer:
        more = {"modalities": ["text", "audio"], "audio": {"voice": VOICE, "format": "wav"}} if speak else {}
        try:
            said = self.say([_message(turn) for turn in sample.turns], **more)
            text, audio = said.get("content"), said.get("audio")
            if text is not None and not isinstance(text, str):
                raise NexusError(f"{self._server.url}: expected content to be a text, given {excerpt(repr(text))}")
            if not isinstance(audio, dict):
                if speak:
                    raise NexusError(f"{self._server.url}: sound was asked for, given none; is it a model that speaks?")
                return Answer(text or "", None, said["complete"])
            return Answer(text or audio.get("transcript"), self._sound(audio), said["complete"])
        except NexusError as error:
            raise type(error)(f"item {sample.id}: {error}") from None

    def _sound(self, audio: Mapping[str, Any]) -> Audio:
        try:
            return load_audio(base64.b64decode(str(audio.get("data")), validate=True))
        except ValueError:
            raise NexusError(f"{self._server.url}: audio.data is no base64; expected a wav file in it") from None


def address_of(text: str) -> tuple[str, str]:
    """URL and model of `URL#MODEL`. Raises BadConfig."""
    url, sharp, model = text.partition("#")
    if not sharp or not model:
        raise BadConfig(f"openai:{excerpt(url)}: expected openai:URL#MODEL, given no model; name one behind a '#'")
    return url, model


def _message(turn: Turn) -> dict[str, Any]:
    return {"role": turn.role, "content": [_part(part) for part in turn.parts]}


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, Video):
        if part.path is None:
            raise BadRecord("a film of loaded frames cannot be sent to a server; give its file")
        kind = part.path.suffix.lower().removeprefix(".")
        data = base64.b64encode(part.path.read_bytes()).decode()
        return {"type": "video_url", "video_url": {"url": f"data:video/{kind};base64,{data}"}}
    match load(part):
        case Text(aloud=True):
            raise BadRecord("chat completions read nothing aloud; record the speech and give answers:FILE")
        case Text(text=text):
            return {"type": "text", "text": text}
        case Audio(samples=samples, rate_hz=rate_hz) if samples is not None:
            data = base64.b64encode(wav_bytes(samples, rate_hz)).decode()
            return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        case Image(pixels=pixels) if pixels is not None:
            data = base64.b64encode(png_bytes(pixels)).decode()
            return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        case loaded:
            raise AssertionError(f"{loaded} is not loaded")


def _digest_of_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
