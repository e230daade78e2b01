"""Speech to text by a server of OpenAI's `/v1/audio/transcriptions`, such as one that runs Whisper.

One request per clip, a form with a 16-bit wav file; the answer is a JSON object with `text`. Only the address that the
user named is contacted: no redirects, no proxies from the environment. An object holds no connection and may be shared
between threads.
"""

import secrets
import time
from collections.abc import Sequence

from nexus.engines.json_http import JsonServer, PassingError
from nexus.engines.pcm_http import excerpt
from nexus.engines.transcribe import Heard
from nexus.errors import BadConfig, NexusError
from nexus.media import wav_bytes
from nexus.types import Audio

MAX_REPLY_BYTES = 2**20
PATH = "/audio/transcriptions"
FIRST_PAUSE_SECONDS = 0.5


class TranscriptionApi:
    """The server at `url` (`http://127.0.0.1:8000/v1`), which runs `model`. What may pass by itself (no connection,
    silence, 429, 5xx, a reply that breaks off) is tried up to `tries` times, with pauses that double.

    Raises BadConfig for an address, model, token or number that cannot be right; contacts nobody yet.
    """

    def __init__(
        self, url: str, model: str, token: str | None = None, timeout_seconds: float = 120.0, tries: int = 3
    ) -> None:
        if not model.strip():
            raise BadConfig(f"transcription server model: expected a name, given {model!r}; give the one it runs")
        if tries < 1:
            raise BadConfig(f"tries: expected at least 1, given {tries}")
        self._server = JsonServer(url, token, timeout_seconds, MAX_REPLY_BYTES)
        self._model, self._tries = model, tries
        self.id = f"openai:{self._server.url}#{model}"

    def hear(self, audios: Sequence[Audio], language: str) -> list[Heard]:
        """What is said in every clip (loaded mono sound at any rate), in `language` (ISO 639-1), one after the other.

        The protocol knows no confidence. Raises NexusError for the first clip that fails for good.
        """
        return [self._heard(audio, language) for audio in audios]

    def _heard(self, audio: Audio, language: str) -> Heard:
        assert audio.samples is not None, "sound is not loaded"
        fields = {"model": self._model, "language": language, "temperature": "0", "response_format": "json"}
        body, content_type = _form(fields, wav_bytes(audio.samples, audio.rate_hz))
        for attempt in range(1, self._tries):
            try:
                return self._asked(body, content_type)
            except PassingError:
                time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        return self._asked(body, content_type)

    def _asked(self, body: bytes, content_type: str) -> Heard:
        reply = self._server.send(PATH, body, content_type)
        if not isinstance(reply, dict) or not isinstance(reply.get("text"), str):
            said = excerpt(repr(reply).encode(), None)
            raise NexusError(
                f"{self._server.url}{PATH}: expected a JSON object with a text, given {said}; is it a server of "
                "transcriptions?"
            )
        return Heard(" ".join(reply["text"].split()))


def _form(fields: dict[str, str], wav: bytes) -> tuple[bytes, str]:
    """Body and content type of a form: fields, then the file (RFC 7578)."""
    boundary = f"nexus-{secrets.token_hex(16)}"
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = 'Content-Disposition: form-data; name="file"; filename="speech.wav"\r\nContent-Type: audio/wav'
    body = b"".join([*parts, f"--{boundary}\r\n{head}\r\n\r\n".encode(), wav, f"\r\n--{boundary}--\r\n".encode()])
    return body, f"multipart/form-data; boundary={boundary}"
