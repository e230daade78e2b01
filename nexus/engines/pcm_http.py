"""Headerless 16-bit mono PCM over HTTP: one request, sound as it comes, every failure one line with the address.

Such sound says neither its rate nor whether it is whole. So only replies that declare their length or come in chunks
are taken, and what looks like text or like a sound file is refused. Only the address that the user named is contacted:
no redirects, no proxies from the environment. A `PcmServer` holds no connection and may be shared between threads.
"""

import contextlib
import http.client
import io
import socket
import ssl
import time
import urllib.parse
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np

from nexus.errors import BadConfig, NexusError

SOUND_TYPES = ("", "application/octet-stream", "audio/pcm", "audio/x-pcm")  # FastAPI's StreamingResponse names none
HEAD_BYTES = 16  # if they all read as ASCII it is text: eight loud samples do by chance once in ten million times
BLOCK_BYTES = 2**16
EXCERPT_LETTERS = 200
STEPS = {
    401: "give the right token=",
    403: "give the right token=",
    404: "is this the right url, and does that version of the server have this mode?",
    405: "is this the right url?",
    422: "the server wants other fields; is it of the kind and version that was named?",
}


@dataclass(frozen=True)
class Timeouts:
    """How long to wait: for the connection, for each next byte (the first one comes after the first sentence is
    made), and for the server in all during one reply; time that the caller takes between pieces does not count."""

    connect_seconds: float = 5.0
    silence_seconds: float = 60.0
    total_seconds: float = 600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_positive(field.name, getattr(self, field.name))


def check_positive(name: str, value: float) -> None:
    """Raises BadConfig for what is no finite number above 0."""
    if not 0 < value < float("inf"):
        raise BadConfig(f"{name}: expected a finite number above 0, given {value!r}")


class PcmServer:
    """One address, how to knock there, and how long to wait. Contacts nobody before `post`.

    `token` is sent as `Authorization: Bearer`. Raises BadConfig for an address or token that cannot be right.
    """

    def __init__(self, url: str, token: str | None, timeouts: Timeouts) -> None:
        # An address may carry a password: it is not repeated where it may.
        shown = "one with '@'" if "@" in url else ascii(url.partition("?")[0])
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError:
            raise BadConfig(f"server url: expected http://HOST:PORT, given {shown}; correct it") from None
        clean = url.isascii() and url.isprintable() and " " not in url
        if not clean or parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadConfig(f"server url: expected http://HOST:PORT or https://HOST, given {shown}; correct it")
        if any(mark in url for mark in "@?#"):
            raise BadConfig(
                f"server url: expected scheme, host, port and path alone, given more at {parts.scheme}://"
                f"{parts.hostname}; name credentials with token="
            )
        if token is not None and not (token.isascii() and token.isprintable() and token == token.strip() != ""):
            raise BadConfig("server token: expected printable ASCII without spaces around it; copy it again")
        self.url = url.rstrip("/")
        self._token, self._timeouts = token, timeouts
        self._secure, self._host, self._path = parts.scheme == "https", parts.hostname, parts.path.rstrip("/")
        self._port = port if port is not None else 443 if self._secure else 80

    def post(self, path: str, body: bytes, content_type: str) -> Generator[np.ndarray, None, None]:
        """The sound that answers `body`, pieces f32 [w] within -1..1, none empty, as they come.

        The request leaves with the first piece asked for, and the connection ends with the generator. Raises
        NexusError: no connection, no answer in time, status not 200, no PCM, an empty, odd or broken reply.
        """
        held, num_bytes = b"", 0
        with contextlib.closing(self._received(path, body, content_type)) as received:
            for piece in self._with_checked_head(received, self.url + path):
                held += piece
                num_bytes += len(piece)
                whole = len(held) // 2 * 2
                if whole:
                    yield np.frombuffer(held[:whole], "<i2").astype(np.float32) / 32768
                    held = held[whole:]
        if held:
            raise NexusError(
                f"{self.url}{path}: expected 16-bit samples, given {num_bytes:,} bytes, an odd number; see the "
                "server's log for what ended it early"
            )

    def _received(self, path: str, body: bytes, content_type: str) -> Generator[bytes, None, None]:
        where, received = self.url + path, None
        headers = {"Content-Type": content_type, "Accept": "application/octet-stream", "Connection": "close"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        with contextlib.ExitStack() as stack:
            try:
                connection = self.connect()
                stack.callback(connection.close)
                # A server that refuses stops listening before it was told all; its answer says why.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.request("POST", self._path + path, body, headers)
                response = stack.enter_context(contextlib.closing(connection.getresponse()))
                self._check(response, where)
                received = 0
                declared = None if response.chunked else response.length
                while piece := response.read1(BLOCK_BYTES):
                    received += len(piece)
                    yield piece
            except (OSError, http.client.HTTPException) as error:
                raise NexusError(f"{where}: {_reason(error, received)}") from None
        if declared is not None and received < declared:
            raise NexusError(f"{where}: {_broken_off(received, declared)}")

    def _with_checked_head(self, received: Iterator[bytes], where: str) -> Iterator[bytes]:
        head = b""
        for piece in received:
            head += piece
            if len(head) >= HEAD_BYTES:
                break
        start = head[:HEAD_BYTES]
        if not start:
            raise NexusError(f"{where}: expected sound, given an empty reply; see the server's log, or change the text")
        if start[:4] in (b"RIFF", b"OggS", b"fLaC") or start[:3] == b"ID3":
            raise NexusError(
                f"{where}: expected headerless PCM, given a sound file ({start[:4]!r}); let the server send raw int16"
            )
        if start.isascii() and start.translate(None, b"\t\n\r").decode().isprintable():
            raise NexusError(
                f"{where}: expected 16-bit PCM, given text ({excerpt(head, self._token)}); is this the right url?"
            )
        yield head
        yield from received

    def connect(self) -> http.client.HTTPConnection:
        seconds = self._timeouts.connect_seconds
        connection = (
            http.client.HTTPSConnection(self._host, self._port, timeout=seconds, context=ssl.create_default_context())
            if self._secure
            else http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        )
        try:
            connection.connect()
        except TimeoutError:
            connection.close()
            raise TimeoutError(f"no connection within {seconds:g} s (connect_seconds); is it running?") from None
        except (OSError, UnicodeError) as error:  # the latter for names that cannot be one of a host
            connection.close()
            raise OSError(
                f"cannot be reached ({_words(error)}); is the server running, are scheme, host and port right?"
            ) from None
        connection.sock = _PatientSocket(connection.sock, self._timeouts)
        return connection

    def _check(self, response: http.client.HTTPResponse, where: str) -> None:
        if response.status != 200:
            self.refuse_status(response, where)
        kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
        if kind not in SOUND_TYPES:
            said = f"expected headerless PCM, given {excerpt(kind.encode(), None)}"
            raise NexusError(f"{where}: {said} ({self._explanation(response)}); is this the right url?")
        if (response.getheader("Content-Encoding") or "identity").lower() != "identity":
            raise NexusError(f"{where}: expected plain bytes, given compressed ones; switch compression off there")
        if not response.chunked and response.length is None:
            raise NexusError(
                f"{where}: the reply neither declares its length nor comes in chunks, so a loss would go unnoticed; "
                "let the server, or the proxy before it, speak HTTP/1.1"
            )

    def refuse_status(self, response: http.client.HTTPResponse, where: str) -> NoReturn:
        said = f"expected status 200, given {response.status}"
        if 300 <= response.status < 400:
            target = (response.getheader("Location") or "nowhere").partition("?")[0]
            shown = "another address" if "@" in target else excerpt(target.encode(), self._token)
            raise NexusError(f"{where}: {said}, a redirect to {shown}, which is not followed; name the final address")
        step = STEPS.get(response.status, "see the server's log")
        raise NexusError(f"{where}: {said} ({self._explanation(response)}); {step}")

    def _explanation(self, response: http.client.HTTPResponse) -> str:
        try:
            return excerpt(response.read(4 * EXCERPT_LETTERS), self._token)
        except (OSError, http.client.HTTPException):
            return "its explanation broke off"


class _PatientSocket:
    """What http.client needs of a socket, with a deadline: a drop of bytes now and then does not extend it."""

    def __init__(self, sock: socket.socket, timeouts: Timeouts) -> None:
        self._sock, self._timeouts = sock, timeouts
        self._left_seconds = timeouts.total_seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Waits inside are limited, and counted."""
        limit = min(self._timeouts.silence_seconds, self._left_seconds)
        started = time.monotonic()
        try:
            if limit <= 0:
                raise TimeoutError
            self._sock.settimeout(limit)
            yield
        except TimeoutError:
            if limit < self._timeouts.silence_seconds:
                said = f"not finished after {self._timeouts.total_seconds:g} s of waiting (total_seconds)"
            else:
                said = f"silent for {self._timeouts.silence_seconds:g} s (silence_seconds)"
            raise TimeoutError(f"{said}; see the server's log, or wait longer (Timeouts)") from None
        finally:
            self._left_seconds -= time.monotonic() - started

    def sendall(self, data: bytes) -> None:
        with self.waiting():
            self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_PatientFile(self, self._sock.makefile("rb", buffering=0)))

    def close(self) -> None:
        self._sock.close()  # ends when the file from makefile is closed as well


class _PatientFile(io.RawIOBase):
    def __init__(self, owner: _PatientSocket, file: Any) -> None:
        self._owner, self._file = owner, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        with self._owner.waiting():
            count: int | None = self._file.readinto(buffer)
            return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _reason(error: Exception, received: int | None) -> str:
    """What went wrong, in words; `received` bytes of sound had come, None if there was none yet."""
    match error:
        case TimeoutError():
            return _words(error)
        case http.client.IncompleteRead() | ConnectionError() if received is not None:
            return _broken_off(received)
        case http.client.IncompleteRead() | ConnectionError():
            return "closed the connection without an answer; see the server's log"
        case http.client.HTTPException():
            return f"expected HTTP, given something else ({_words(error)}); is this the right url?"
        case _:
            return _words(error)


def _broken_off(received: int, declared: int | None = None) -> str:
    of = "" if declared is None else f" of {declared:,}"
    return f"the sound broke off after {received:,} bytes{of}; see the server's log, it failed while speaking"


def _words(error: Exception) -> str:
    return excerpt((getattr(error, "strerror", None) or str(error) or type(error).__name__).encode(), None)


def excerpt(data: bytes, token: str | None) -> str:
    """The beginning of a foreign text: one line, nothing that moves a cursor, no credentials."""
    text = data.decode("utf-8", "replace")
    if token is not None:
        text = text.replace(token, "***")
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return (text[:EXCERPT_LETTERS] + "…" if len(text) > EXCERPT_LETTERS else text) or "no explanation"
