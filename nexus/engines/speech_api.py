"""Speech from a server of OpenAI's `/v1/audio/speech`, as many local servers offer it too.

One request per text, `POST URL/audio/speech` with a JSON object; the answer must be headerless 16-bit mono PCM
(`response_format: pcm`), of which every failure is one line with the address. An object holds no connection and may be
shared between threads.
"""

import contextlib
import json

import numpy as np

from nexus.engines.pcm_http import PcmServer, Timeouts, check_positive
from nexus.errors import BadConfig, NexusError
from nexus.types import Audio

RATE_HZ = 24_000  # of OpenAI's pcm, which says it in its documentation and nowhere else
TIMEOUTS = Timeouts()


class SpeechApi:
    """The server at `url` (`https://api.openai.com/v1`, `http://127.0.0.1:8880/v1`), which runs `model` and answers
    at `rate_hz`: PCM does not say its rate, so a wrong one here is a wrong speed there.

    `token` is sent as `Authorization: Bearer`; `max_seconds` of sound per text is the most that is taken. Raises
    BadConfig for an address, model, token or number that cannot be right; contacts nobody yet.
    """

    def __init__(
        self,
        url: str,
        model: str,
        token: str | None = None,
        rate_hz: int = RATE_HZ,
        timeouts: Timeouts = TIMEOUTS,
        max_seconds: float = 300.0,
    ) -> None:
        if not model.strip():
            raise BadConfig(f"speech server model: expected a name, given {model!r}; give the one the server runs")
        check_positive("rate_hz", float(rate_hz))
        check_positive("max_seconds", max_seconds)
        self._server, self._model = PcmServer(url, token, timeouts), model
        self.rate_hz, self._max_seconds = rate_hz, max_seconds

    def speak(self, text: str, voice: str, speed: float = 1.0) -> Audio:
        """`text` as mono f32 [W] within -1..1 at `rate_hz`, in a voice that the server knows.

        Raises NexusError for empty text or voice, before anything is sent, and for every failure on the way: no
        connection, no answer in time, a status that is not 200, a reply that is no PCM, cut short or too long.
        """
        for name, value in {"text": text, "voice": voice}.items():
            if not value.strip():
                raise NexusError(f"{self._server.url}/audio/speech: {name} is empty; give one")
        call = {"model": self._model, "input": text, "voice": voice, "response_format": "pcm", "speed": speed}
        pieces, num_samples = [], 0
        body = json.dumps(call).encode()
        with contextlib.closing(self._server.post("/audio/speech", body, "application/json")) as received:
            for piece in received:
                pieces.append(piece)
                num_samples += len(piece)
                if num_samples > self._max_seconds * self.rate_hz:
                    raise NexusError(
                        f"{self._server.url}/audio/speech: given {num_samples / self.rate_hz:.1f} s of sound or more, "
                        f"the limit is {self._max_seconds:g} s (max_seconds); shorten the text or raise the limit"
                    )
        return Audio(samples=np.concatenate(pieces), rate_hz=self.rate_hz)
