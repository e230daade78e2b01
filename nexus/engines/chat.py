"""Answers from a chat model behind an OpenAI-compatible address: patient with the server, strict with its words.

One request per answer, `POST URL/chat/completions`, no streaming. What may pass by itself (no connection, silence, 408,
425, 429, 5xx, a page where JSON belongs) is tried again after a pause that doubles, or that the server names in
Retry-After. Of an answer only a whole text counts: one choice, a `content` that is a text, `finish_reason` "stop". Only
the address that the user named is contacted: no redirects, no proxies from the environment.

A `ChatModel` holds no connection and may be shared between threads; they share its pace. Answers are kept under the
hash of what was asked, so that a run made again asks nothing twice.
"""

import contextlib
import email.utils
import hashlib
import http.client
import json
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus.engines.pcm_http import PcmServer, Timeouts, check_positive
from nexus.errors import BadConfig, NexusError

MAX_REPLY_BYTES = 4 * 2**20
EXCERPT_LETTERS = 120
PASSING = (408, 425, 429, 500, 502, 503, 504, 507, 529)
HOPELESS = {  # no other request would fare better
    401: "give the right token",
    403: "give the right token",
    404: "are url and model right?",
    405: "is this the right url?",
}


class ChatFailed(NexusError):
    """No answer to this request. `reason` is a short stable key: no_connection, timed_out, rate_limited, server_error,
    refused, no_json, no_answer, cut_off."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Patience:
    """How often to ask, and how long to wait between: pauses double from `first_pause_seconds`; a server that asks
    for more than `max_pause_seconds` is not waited for. `per_minute` bounds the requests that are sent, None: no
    bound; it holds for this process."""

    tries: int = 5
    first_pause_seconds: float = 1.0
    max_pause_seconds: float = 60.0
    per_minute: float | None = None

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise BadConfig(f"tries: expected at least 1, given {self.tries}")
        check_positive("first_pause_seconds", self.first_pause_seconds)
        check_positive("max_pause_seconds", self.max_pause_seconds)
        if self.per_minute is not None:
            check_positive("per_minute", self.per_minute)


class ChatModel:
    """One model at one address. Contacts nobody before `complete`.

    `url` ends before `/chat/completions` (`http://HOST:PORT/v1`); `token` is sent as `Authorization: Bearer`; `cache`
    keeps answers. Raises BadConfig for an address or token that cannot be right.
    """

    def __init__(
        self,
        url: str,
        model: str,
        token: str | None = None,
        timeouts: Timeouts | None = None,
        patience: Patience | None = None,
        cache: "AnswerCache | None" = None,
    ) -> None:
        self._server = PcmServer(url, token, timeouts or Timeouts())
        self._patience, self._cache = patience or Patience(), cache
        self._pace = _Pace(self._patience.per_minute)
        self.model, self._token = model, token
        self._where = f"{self._server.url}/chat/completions"
        self._path = urllib.parse.urlsplit(self._where).path

    def complete(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """The answer to `messages` ({"role", "content"} each), as it was given; `options` are fields of the request
        (temperature, seed, max_tokens, response_format).

        Raises ChatFailed after the last try, and where this request alone was refused; NexusError where no request can
        succeed (wrong address, token or model).
        """
        body = json.dumps({"model": self.model, "messages": list(messages), **options}, ensure_ascii=True).encode()
        kept = self._cache.get(body) if self._cache else None
        if kept is not None:
            return kept
        answer = self._patiently(body)
        if self._cache:
            self._cache.put(body, answer)
        return answer

    def _patiently(self, body: bytes) -> str:
        tries, pause = self._patience.tries, self._patience.first_pause_seconds
        for _ in range(tries - 1):
            self._pace.wait()
            try:
                return self._ask(body)
            except _Passing as error:
                self._pause(pause, error)
            pause = min(2 * pause, self._patience.max_pause_seconds)
        self._pace.wait()
        try:
            return self._ask(body)
        except _Passing as error:
            raise ChatFailed(error.reason, f"{error} (try {tries} of {tries})") from None

    def _pause(self, seconds: float, error: "_Passing") -> None:
        """Wait before the next try: as long as the server asks, or else `seconds`."""
        asked, most = error.wait_seconds, self._patience.max_pause_seconds
        if asked is not None and asked > most:
            raise ChatFailed(
                error.reason, f"{error}; it asks for {asked:g} s, more than max_pause_seconds {most:g}; try later"
            )
        if error.reason == "rate_limited":
            self._pace.hold(seconds if asked is None else asked)  # all threads: the limit is of the account
        else:
            time.sleep(seconds if asked is None else asked)

    def _ask(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        with contextlib.ExitStack() as stack:
            try:
                connection = self._server.connect()
                stack.callback(connection.close)
                # A server that refuses stops listening before it was told all; its answer says why.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.request("POST", self._path, body, headers)
                response = stack.enter_context(contextlib.closing(connection.getresponse()))
                data = response.read(MAX_REPLY_BYTES + 1)
                if response.length and len(data) <= MAX_REPLY_BYTES:
                    raise ConnectionError(f"it broke off {response.length} bytes before its end")
            except TimeoutError as error:
                raise _Passing("timed_out", f"{self._where}: {_line(str(error))}") from None
            except (OSError, http.client.HTTPException) as error:
                said = _line(getattr(error, "strerror", None) or str(error) or type(error).__name__)
                raise _Passing("no_connection", f"{self._where}: no whole reply ({said})") from None
        self._check_status(response, data)
        if len(data) > MAX_REPLY_BYTES:
            raise ChatFailed("no_answer", f"{self._where}: expected at most {MAX_REPLY_BYTES} bytes, given more")
        return self._answer_in(data)

    def _check_status(self, response: http.client.HTTPResponse, data: bytes) -> None:
        status = response.status
        if status == 200:
            return
        said = f"{self._where}: expected status 200, given {status} ({self._excerpt(data)})"
        if status in PASSING:
            reason = "rate_limited" if status == 429 else "timed_out" if status == 408 else "server_error"
            raise _Passing(reason, said, _seconds_to_wait(response.getheader("Retry-After")))
        if 300 <= status < 400:
            raise NexusError(f"{said}, a redirect, which is not followed; name the final address")
        if status in HOPELESS:
            raise NexusError(f"{said}; {HOPELESS[status]}")
        raise ChatFailed("refused" if status < 500 else "server_error", said)

    def _answer_in(self, data: bytes) -> str:
        try:
            reply = json.loads(data)
        except (ValueError, RecursionError):
            # Proxies send pages of their own with status 200 while the server behind them starts.
            raise _Passing("no_json", f"{self._where}: expected JSON, given {self._excerpt(data)}") from None
        match reply:
            case {"choices": [{"message": {"content": str(text)}, "finish_reason": "stop"}]} if _is_unicode(text):
                return text
            case {"choices": [{"finish_reason": "length"}]}:
                raise ChatFailed("cut_off", f"{self._where}: the answer was cut at max_tokens; allow more")
        raise ChatFailed(
            "no_answer", f"{self._where}: expected one finished choice with a text, given {self._excerpt(data)}"
        )

    def _excerpt(self, data: bytes) -> str:
        text = data[: 4 * EXCERPT_LETTERS].decode("utf-8", "replace")
        return _line(text.replace(self._token, "***") if self._token else text) or "nothing"


class _Passing(Exception):
    """What may pass by itself. `wait_seconds`: how long the server asks to wait."""

    def __init__(self, reason: str, message: str, wait_seconds: float | None = None) -> None:
        super().__init__(message)
        self.reason, self.wait_seconds = reason, wait_seconds


class _Pace:
    """When the next request may leave; shared by all threads."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0  # time.monotonic() before which none leaves

    def wait(self) -> None:
        """Until a request may leave."""
        while True:
            with self._lock:
                now = time.monotonic()
                if self._next <= now:
                    self._next = now + self._interval
                    return
                seconds = self._next - now
            time.sleep(seconds)

    def hold(self, seconds: float) -> None:
        """Nobody leaves for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class AnswerCache:
    """Answers in one file, by the hash of the whole request; several processes may share it."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT) WITHOUT ROWID")

    def get(self, request: bytes) -> str | None:
        """The answer that was kept for a request."""
        with self._lock, self._told():
            row = self._base.execute("SELECT answer FROM answers WHERE key = ?", (_key(request),)).fetchone()
        return None if row is None else str(row[0])

    def put(self, request: bytes, answer: str) -> None:
        """Keep an answer; it is there, whole, after a kill of the process."""
        with self._lock, self._told():
            self._base.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (_key(request), answer))

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise NexusError(f"{self._path}: the cache of answers fails ({error}); make room or delete it") from None


def _key(request: bytes) -> bytes:
    return hashlib.sha256(request).digest()


def _seconds_to_wait(header: str | None) -> float | None:
    """Retry-After, in seconds or as a date."""
    if header is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(header)) if float(header) < float("inf") else None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _line(text: str) -> str:
    """The beginning of a foreign text: one line, nothing that moves a cursor."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text[:EXCERPT_LETTERS] + "…" if len(text) > EXCERPT_LETTERS else text
