"""Clients of OpenAI's speech and transcription protocols at the level of bytes, and Whisper from a folder."""

import io
import json
import re
import socket
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import HEAD, PCM, SOUND, Loopback, Request, chunked, failure, reply
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

import nexus.engines.transcribe_api
from nexus.engines.pcm_http import Timeouts
from nexus.engines.speech_api import SpeechApi
from nexus.engines.transcribe import Heard
from nexus.engines.transcribe_api import TranscriptionApi
from nexus.engines.whisper import Whisper
from nexus.errors import BadCheckpoint, BadConfig, BadMedia, NexusError
from nexus.media import resample
from nexus.types import Audio

CLIP = Audio(samples=SOUND, rate_hz=16_000)


def answer(body: object, status: str = "200 OK") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data


def hold(connection: socket.socket, request: Request) -> None:
    connection.recv(1)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nexus.engines.transcribe_api, "FIRST_PAUSE_SECONDS", 0.01)


# --- speech


def test_speech_is_asked_for_as_the_protocol_says_and_comes_as_floats() -> None:
    with Loopback(reply(chunked(PCM.tobytes(), [1, 777], "content-type: audio/pcm\r\n"))) as server:
        sound = SpeechApi(f"{server.url}/v1/", "tts-1", "key", 22_050).speak("Grüß Gott", "nova", speed=1.5)
        [request] = server.requests
    assert request.line == "POST /v1/audio/speech HTTP/1.1"
    assert request.headers["content-type"] == "application/json" and request.headers["authorization"] == "Bearer key"
    assert json.loads(request.body) == {
        "model": "tts-1",
        "input": "Grüß Gott",
        "voice": "nova",
        "response_format": "pcm",
        "speed": 1.5,
    }
    assert sound.rate_hz == 22_050 and np.array_equal(sound.samples, SOUND)


@pytest.mark.parametrize(("text", "voice", "said"), [("", "nova", "text is empty"), ("hi", " ", "voice is empty")])
def test_nothing_is_sent_for_empty_words(text: str, voice: str, said: str) -> None:
    with Loopback(reply(b"")) as server:
        assert said in failure(lambda: SpeechApi(server.url, "tts").speak(text, voice))
        assert server.requests == []


@pytest.mark.parametrize("changes", [{"url": "ftp://h"}, {"model": " "}, {"rate_hz": 0}, {"max_seconds": 0.0}])
def test_a_speech_server_that_cannot_be_is_refused_at_once(changes: dict[str, Any]) -> None:
    failure(lambda: SpeechApi(**{"url": "http://127.0.0.1:9", "model": "tts", **changes}), BadConfig)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (answer({"error": "slow down"}, "429 Too Many Requests"), "given 429"),
        (answer(b"<html>proxy</html>"), "given text"),
        (HEAD + b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}", "given application/json"),
        (chunked(PCM.tobytes() + b"\0"), "an odd number"),
        (HEAD + b"content-length: 9602\r\n\r\n" + PCM.tobytes()[:100], "broke off after 100 bytes of 9,602"),
        (chunked(b"RIFF" + PCM.tobytes()), "given a sound file"),
        (chunked(PCM.tobytes() * 100), "the limit is 10 s"),
    ],
)
def test_a_reply_that_is_no_whole_sound_is_refused(data: bytes, said: str) -> None:
    with Loopback(reply(data)) as server:
        assert said in failure(lambda: SpeechApi(server.url, "tts", max_seconds=10.0).speak("hi", "nova"))


def test_a_silent_speech_server_is_given_up() -> None:
    with Loopback(hold) as server:
        api = SpeechApi(server.url, "tts", timeouts=Timeouts(silence_seconds=0.1))
        assert "silent for 0.1 s" in failure(lambda: api.speak("hi", "nova"))


# --- transcription


def test_a_clip_is_sent_as_a_form_with_a_whole_wav_file() -> None:
    with Loopback(reply(answer({"text": " Hello,\n world. "}))) as server:
        api = TranscriptionApi(f"{server.url}/v1", "whisper-1", "key")
        assert api.hear([CLIP, CLIP], "en") == [Heard("Hello, world.")] * 2
        request = server.requests[0]
        assert api.id == f"openai:{server.url}/v1#whisper-1"
    assert request.line == "POST /v1/audio/transcriptions HTTP/1.1"
    assert request.headers["authorization"] == "Bearer key"
    boundary = request.headers["content-type"].removeprefix("multipart/form-data; boundary=").encode()
    *parts, end = request.body.split(b"--" + boundary)
    fields = {}
    for part in parts[1:]:
        head, _, value = part.partition(b"\r\n\r\n")
        name = re.search(rb'name="(\w+)"', head)
        assert name is not None
        fields[name[1].decode()] = value.removesuffix(b"\r\n")
    assert end == b"--\r\n"
    with wave.open(io.BytesIO(fields.pop("file"))) as file:
        assert file.getparams()[:4] == (1, 2, 16_000, len(PCM))
        assert file.readframes(len(PCM)) == PCM.tobytes()
    assert fields == {"model": b"whisper-1", "language": b"en", "temperature": b"0", "response_format": b"json"}


@pytest.mark.parametrize(
    "busy",
    [
        answer({"error": "slow down"}, "429 Too Many Requests"),
        answer(b"oops", "500 Internal Server Error"),
        HEAD + b'content-length: 99\r\n\r\n{"te',
        b"",
    ],
)
def test_what_may_pass_by_itself_is_tried_again(busy: bytes) -> None:
    answers = iter([busy, busy, answer({"text": "hi"})])
    with Loopback(lambda connection, request: connection.sendall(next(answers))) as server:
        assert TranscriptionApi(server.url, "m", tries=3).hear([CLIP], "en") == [Heard("hi")]


@pytest.mark.parametrize(
    ("script", "said", "num_requests"),
    [
        (reply(answer(b"oops", "503 Service Unavailable")), r"given 503 \(oops\)", 2),
        (hold, "silent for 0.2 s|not finished after 0.2 s", 2),
        (reply(answer({"error": "who"}, "401 Unauthorized")), "give the right token", 1),
        (reply(answer(b"<html>login</html>")), "expected JSON, given <html>login", 1),
        (reply(answer({"words": []})), "expected a JSON object with a text", 1),
        (reply(answer(b" " * 2**21)), "longer than 1,048,576 bytes", 1),
        (reply(b"SSH-2.0-OpenSSH_9\r\n\r\n"), "expected HTTP", 2),
        (reply(b"HTTP/1.1 302 Found\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n"), "not followed", 1),
    ],
)
def test_what_a_transcription_server_does_wrong_is_one_line(
    script: Callable[[socket.socket, Request], None], said: str, num_requests: int
) -> None:
    with Loopback(script) as server:
        api = TranscriptionApi(server.url, "m", "key", timeout_seconds=0.2, tries=2)
        with pytest.raises(NexusError, match=said) as caught:
            api.hear([CLIP], "en")
        assert "\n" not in str(caught.value) and "key" not in str(caught.value)
        assert str(caught.value).startswith(f"{server.url}/audio/transcriptions: ")
        assert len(server.requests) == num_requests


@pytest.mark.parametrize("changes", [{"url": "h"}, {"model": ""}, {"tries": 0}, {"timeout_seconds": 0.0}])
def test_a_transcription_server_that_cannot_be_is_refused_at_once(changes: dict[str, Any]) -> None:
    failure(lambda: TranscriptionApi(**{"url": "http://127.0.0.1:9", "model": "m", **changes}), BadConfig)


# --- Whisper from a folder

LANGUAGES = ("en", "zh")


def tiny_whisper(folder: Path, multilingual: bool = True) -> None:
    """A Whisper of random weights whose tokens are bytes, as transformers saves one."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = [chr(byte) for byte in visible] + [chr(256 + number) for number in range(len(hidden))]
    tokenizer = WhisperTokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    marks = ["endoftext", "startoftranscript", *LANGUAGES, "translate", "transcribe", "startoflm", "startofprev"]
    marks = [f"<|{mark}|>" for mark in (*marks, "nospeech", "notimestamps")]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    common: dict[str, Any] = {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end}
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    quiet: dict[str, Any] = {"suppress_tokens": None, "begin_suppress_tokens": None, "bos_token_id": end}
    torch.manual_seed(1)
    model = WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=len(tokenizer), **sizes, **heads, **common, **quiet)
    )
    known = {
        "lang_to_id": {f"<|{language}|>": ids[f"<|{language}|>"] for language in LANGUAGES},
        "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
    }
    model.generation_config = GenerationConfig(
        **common,
        bos_token_id=end,
        max_length=16,
        is_multilingual=multilingual,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        **(known if multilingual else {}),
    )
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    tiny_whisper(folder)
    return folder


def clips(*seconds: float) -> list[Audio]:
    rng = np.random.default_rng(0)
    return [Audio(samples=rng.normal(0, 0.1, round(22_050 * s)).astype(np.float32), rate_hz=22_050) for s in seconds]


def test_whisper_gives_the_same_words_for_any_batch_and_says_who_it_is(folder: Path) -> None:
    together, alone = Whisper(folder, batch=2), Whisper(folder, batch=1)
    heard = together.hear(clips(0.5, 2.0, 1.0), "en")
    assert [what.text for what in heard] == [what.text for what in alone.hear(clips(0.5, 2.0, 1.0), "en")]
    assert together.id == f"whisper {folder.name}"
    assert together.hear([], "en") == []


def test_the_confidence_of_whisper_is_the_probability_of_its_tokens(folder: Path) -> None:
    [heard] = Whisper(folder).hear(clips(1.0), "zh")
    model = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()
    processor: Any = WhisperProcessor.from_pretrained(folder, local_files_only=True)
    wave_16k = resample(clips(1.0)[0].samples, 22_050, 16_000)  # type: ignore[arg-type]
    features = processor.feature_extractor(wave_16k, sampling_rate=16_000, return_tensors="pt").input_features
    marks = ["<|startoftranscript|>", "<|zh|>", "<|transcribe|>", "<|notimestamps|>"]
    prompt = processor.tokenizer.convert_tokens_to_ids(marks)
    tokens, logs = list(prompt), []
    with torch.no_grad():
        while len(tokens) < len(prompt) + 16:
            logits = model(features, decoder_input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(logits.argmax()))
            logs.append(float(logits.max()))
            if tokens[-1] == model.generation_config.eos_token_id:
                break
    assert heard.text == " ".join(processor.decode(tokens, skip_special_tokens=True).split())
    assert heard.confidence == pytest.approx(np.exp(np.mean(logs)), rel=1e-3)


def test_whisper_refuses_what_it_cannot_hear(folder: Path, tmp_path: Path) -> None:
    ear = Whisper(folder)
    assert "at most 30 s, given 31.0 s" in failure(lambda: ear.hear(clips(31.0), "en"), BadMedia)
    assert "clip 1: expected finite samples" in failure(lambda: ear.hear([*clips(1.0), *clips(0.0)], "en"), BadMedia)
    assert "'fr' is none of them" in failure(lambda: ear.hear(clips(1.0), "fr"))
    tiny_whisper(tmp_path / "english", multilingual=False)
    english = Whisper(tmp_path / "english")
    assert "hears English alone" in failure(lambda: english.hear(clips(1.0), "zh"))
    assert len(english.hear(clips(1.0), "en")) == 1


def test_a_folder_that_is_no_whisper_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "no such folder" in failure(lambda: Whisper(tmp_path / "none"), BadCheckpoint)
    assert "cannot be opened" in failure(lambda: Whisper(tmp_path), BadCheckpoint)
    assert "'tpu9'" in failure(lambda: Whisper(folder, device="tpu9"), BadConfig)
