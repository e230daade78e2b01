"""JSON over HTTP: one request, one whole reply, every failure one line with the address.

Addresses, connections, waits and refusals are those of `PcmServer`: only the address that the user named is contacted.
"""

import contextlib
import http.client
import json
from typing import Any

from nexus.engines.pcm_http import PcmServer, Timeouts, excerpt
from nexus.errors import NexusError

AGAIN = (408, 425, 429, 500, 502, 503, 504, 529)


class PassingError(NexusError):
    """A failure that may be gone the next time: no connection, silence, 429, 5xx, a reply that breaks off."""


class JsonServer(PcmServer):
    """An address that answers in JSON, in replies of at most `max_reply_bytes`. Waits `timeout_seconds` for a reply."""

    def __init__(self, url: str, token: str | None, timeout_seconds: float, max_reply_bytes: int) -> None:
        super().__init__(url, token, Timeouts(silence_seconds=timeout_seconds, total_seconds=timeout_seconds))
        self._max_reply_bytes = max_reply_bytes

    def ask(self, path: str, body: Any) -> Any:
        """What the server says to `body`. Raises NexusError: no connection, no answer in time, status not 200, no
        JSON; the one that may pass by itself is a PassingError."""
        return self.send(path, json.dumps(body).encode(), "application/json")

    def send(self, path: str, body: bytes, content_type: str) -> Any:
        """`ask` with a body of another type."""
        where = self.url + path
        data = self._reply(path, body, content_type, where)
        if len(data) > self._max_reply_bytes:
            raise NexusError(
                f"{where}: the reply is longer than {self._max_reply_bytes:,} bytes; is it the right url, or does it "
                "need shorter answers?"
            )
        try:
            return json.loads(data)
        except ValueError:
            said = excerpt(data, self._token)
            raise NexusError(f"{where}: expected JSON, given {said}; is this the right url?") from None

    def _reply(self, path: str, body: bytes, content_type: str, where: str) -> bytes:
        headers = {"Content-Type": content_type, "Accept": "application/json", "Connection": "close"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            with contextlib.closing(self.connect()) as connection:
                # A server that refuses stops listening before it was told all; its answer says why.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.request("POST", self._path + path, body, headers)
                with contextlib.closing(connection.getresponse()) as response:
                    if response.status != 200:
                        self._refused(response, where)
                    data = response.read(self._max_reply_bytes + 1)
                    if response.length and len(data) <= self._max_reply_bytes:
                        raise http.client.IncompleteRead(data, response.length)
                    return data
        except (OSError, http.client.HTTPException) as error:
            raise PassingError(f"{where}: {_reason(error)}") from None

    def _refused(self, response: http.client.HTTPResponse, where: str) -> None:
        try:
            self.refuse_status(response, where)
        except NexusError as error:
            if response.status in AGAIN:
                raise PassingError(str(error)) from None
            raise


def _reason(error: Exception) -> str:
    said = excerpt(str(error).encode(), None)
    match error:
        case TimeoutError():
            return str(error)
        case http.client.IncompleteRead():
            return "the reply broke off; see the server's log"
        case ConnectionError() | http.client.RemoteDisconnected():
            return "closed the connection without an answer; see the server's log"
        case http.client.HTTPException():
            return f"expected HTTP, given something else ({said}); is this the right url?"
        case _:
            return said
