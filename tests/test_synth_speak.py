"""Speaking: whose voice says which text, and what comes out of espeak-ng and of servers."""

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import HEAD, PCM, SOUND, Loopback, Request, chunked, failure, reply
from pydantic import ValidationError

import nexus.synth.speak
from nexus.errors import BadConfig, BadRecord, NexusError
from nexus.media import write_wav
from nexus.synth.records import Record, Rejected, first_attempt, next_attempt
from nexus.synth.speak import Speak, SpeakConfig, build
from nexus.synth.voices import CosyVoicePool, EspeakPool, Speaker, SpeechApiPool, Voices, speakers_of

POOL = EspeakPool(voices=600)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nexus.synth.speak, "FIRST_PAUSE_SECONDS", 0.01)


def rows(number: int, text: str = "hello there", language: str = "en") -> list[Record]:
    return [first_attempt(text, language, {"source": "test", "line": line}) for line in range(number)]


@pytest.fixture(scope="module")
def english() -> Speak:
    step = build(SpeakConfig(pools={"en": EspeakPool(voices=60), "zh": EspeakPool(voices=20)}, held_out=0.2))
    step.setup()
    return step


# --- who speaks


def test_a_pool_holds_as_many_different_voices_as_asked_for_spread_over_accents() -> None:
    speakers = speakers_of(POOL, "en", seed=3)
    assert len({speaker.id for speaker in speakers}) == len(speakers) == 600
    accents = Counter(speaker.setting["name"].partition("+")[0] for speaker in speakers)
    assert len(accents) == 5 and max(accents.values()) < 2 * min(accents.values())
    assert speakers == speakers_of(POOL, "en", seed=3) != speakers_of(POOL, "en", seed=4)
    assert [speaker.id for speaker in speakers_of(EspeakPool(voices=2000), "en", 0)][1999:]


@given(seed=st.integers(0, 99), row=st.text(min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_every_try_at_a_text_has_another_voice_the_same_in_every_run(seed: int, row: str) -> None:
    speakers = [Speaker(f"v{number}", "en", f"g{number % 20}") for number in range(60)]
    voices, again = (Voices(speakers, seed, 0.0) for _ in range(2))
    drawn = [voices.draw("en", row, attempt) for attempt in range(5)]
    assert len({speaker.id for speaker in drawn if speaker}) == 5
    assert drawn[::-1] == [again.draw("en", row, attempt) for attempt in reversed(range(5))]


def test_texts_are_spread_evenly_over_the_voices() -> None:
    voices = Voices([Speaker(f"v{number}", "en", f"g{number}") for number in range(50)], 0, 0.0)
    counts = Counter(drawn.id for row in range(10_000) if (drawn := voices.draw("en", f"row {row}", 0)))
    assert len(counts) == 50 and min(counts.values()) > 140 and max(counts.values()) < 260


def test_no_group_of_voices_and_no_text_stands_on_both_sides_of_the_split() -> None:
    voices = Voices(speakers_of(POOL, "en", 0), 0, held_out=0.1)
    groups: dict[str, set[str]] = {"train": set(), "test": set()}
    sides = Counter(voices.split_of(f"row {row}") for row in range(3000))
    for row in range(3000):
        for attempt in range(3):
            speaker = voices.draw("en", f"row {row}", attempt)
            assert speaker is not None
            groups[voices.split_of(f"row {row}")].add(speaker.group)
    assert groups["train"] and groups["test"] and not groups["train"] & groups["test"]
    assert 200 < sides["test"] < 400


def test_deaf_voices_are_never_drawn_and_must_be_of_the_pool() -> None:
    speakers = [Speaker(f"v{number}", "en", f"g{number}") for number in range(6)]
    voices = Voices(speakers, 0, 0.0, deaf=["v1", "v4"])
    drawn = [voices.draw("en", f"row {row}", attempt) for row in range(100) for attempt in range(6)]
    assert {speaker.id for speaker in drawn if speaker} == {"v0", "v2", "v3", "v5"}
    assert voices.draw("en", "row", 4) is None
    assert "'v9'" in failure(lambda: Voices(speakers, 0, 0.0, deaf=["v9"]), BadConfig)
    message = failure(lambda: Voices(speakers, 0, 0.0, deaf=[speaker.id for speaker in speakers]), BadConfig)
    assert "of 6 speakers, 0 are left" in message
    assert "for test" in failure(lambda: Voices(speakers[:1], 0, 0.001), BadConfig)


@pytest.mark.parametrize(
    ("pool", "language", "message"),
    [
        (EspeakPool(), "fr", "espeak is set up for en, zh; name a server"),
        (EspeakPool(accents=("en-au",)), "en", "given 'en-au'"),
        (CosyVoicePool(type="cosyvoice", url="http://h", speakers="/nowhere.jsonl"), "zh", "cannot be read"),
    ],
)
def test_pools_that_cannot_be_are_refused(pool: Any, language: str, message: str) -> None:
    assert message in failure(lambda: speakers_of(pool, language, 0), BadConfig)


@pytest.mark.parametrize("section", [{"gain_db": (0, 6)}, {"pools": {}}, {"held_out": 1.0}, {"voices": 3}])
def test_a_section_that_cannot_be_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SpeakConfig.model_validate(section)


# --- espeak-ng


def test_records_come_back_with_sound_and_all_that_made_it(english: Speak) -> None:
    results = english([*rows(6), *rows(2, "你好,今天天气很好", "zh")])
    assert all(isinstance(result, Record) for result in results)
    for result in results:
        assert isinstance(result, Record) and result.sound is not None and result.sound.samples is not None
        assert result.sound.samples.dtype == np.float32 and 0.3 < result.sound.seconds < 4
        assert 0.01 < np.abs(result.sound.samples).max() <= 1
        assert result.meta["split"] in ("train", "test") and -6 <= result.meta["gain_db"] <= 0
        assert result.meta["voice_group"].startswith("espeak ") and "said" not in result.meta
    assert results[-1].meta["voice"].startswith("cmn+")  # type: ignore[union-attr]


def test_a_run_made_again_sounds_the_same_and_another_try_does_not(english: Speak) -> None:
    first, second = english(rows(1))[0], english(rows(1))[0]
    third = english([next_attempt(rows(1)[0])])[0]
    assert isinstance(first, Record) and isinstance(second, Record) and isinstance(third, Record)
    assert first.sound and second.sound and np.array_equal(first.sound.samples, second.sound.samples)
    assert third.id != first.id and third.meta["voice"] != first.meta["voice"]


def test_spelling_that_misleads_the_synthesiser_is_spelled_out_and_noted(english: Speak) -> None:
    [result] = english(rows(1, "It cost $5 in 1999."))
    assert isinstance(result, Record)
    assert result.text == "It cost $5 in 1999." and result.meta["said"] == "It cost 5 dollars in nineteen ninety nine."


def test_the_wrong_language_and_one_without_voices_are_rejected(english: Speak) -> None:
    results = english([*rows(1, "你好,今天天气很好", "en"), *rows(1, "good morning", "zh"), *rows(1, "bonjour", "fr")])
    assert [result.reason for result in results if isinstance(result, Rejected)] == [
        "wrong_language",
        "wrong_language",
        "no_voice",
    ]


def test_what_cannot_be_spoken_raises_and_the_others_are_not_said_twice(english: Speak) -> None:
    good, bad = rows(1)[0], rows(1, "...")[0]
    with pytest.raises(NexusError, match="can be spoken"):
        english([good, bad])
    assert isinstance(english([good])[0], Record)
    with pytest.raises(NexusError, match="can be spoken"):
        english([bad])


def test_the_fingerprint_follows_settings_and_voices() -> None:
    config = SpeakConfig(pools={"en": EspeakPool(voices=4)})
    step = build(config)
    others = [
        build(config, [step.voices.speakers[0].id]),
        build(config.model_copy(update={"seed": 1})),
        build(config.model_copy(update={"gain_db": (-3.0, 0.0)})),
    ]
    prints = {other.fingerprint for other in others}
    assert step.fingerprint == build(config).fingerprint and len(prints) == 3 and step.fingerprint not in prints


# --- servers


def api_step(server: Loopback, **changes: Any) -> Speak:
    pool = SpeechApiPool(type="openai", url=f"{server.url}/v1", model="tts", voices=("anna", "ben", "carl"), **changes)
    step = build(SpeakConfig(pools={"en": pool}, gain_db=(0.0, 0.0)))
    step.setup()
    return step


def test_a_server_of_speech_is_asked_for_the_drawn_voice() -> None:
    with Loopback(reply(chunked(PCM.tobytes()))) as server:
        step = api_step(server)
        results = step(rows(8))
        asked = [json.loads(request.body)["voice"] for request in server.requests]
    assert [f"tts/{voice}" for voice in asked] == [result.meta["voice"] for result in results]  # type: ignore[union-attr]
    assert len(set(asked)) > 1
    sound = results[0].sound if isinstance(results[0], Record) else None
    assert sound is not None and sound.samples is not None
    assert sound.rate_hz == 24_000 and 0 < len(sound.samples) <= len(SOUND)


def status(code: int, body: str = "busy") -> bytes:
    return f"HTTP/1.1 {code} Reason\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def test_a_server_that_is_busy_twice_is_asked_a_third_time() -> None:
    answers = iter([status(429), status(500), chunked(PCM.tobytes())])
    with Loopback(lambda connection, request: connection.sendall(next(answers))) as server:
        [result] = api_step(server)(rows(1))
    assert isinstance(result, Record) and len(server.requests) == 3


def hold(connection: socket.socket, request: Request) -> None:
    connection.recv(1)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (reply(status(500, "out of memory")), "given 500 (out of memory)"),
        (reply(status(401, "who are you")), "given 401"),
        (reply(HEAD + b"content-type: text/html\r\ncontent-length: 15\r\n\r\n<html>hi</html>"), "given text/html"),
        (reply(chunked(b"<!DOCTYPE html><html><body>hello</body></html>")), "given text"),
        (reply(HEAD + b"content-length: 9602\r\n\r\n" + PCM.tobytes()[:4000]), "broke off after 4,000 bytes of 9,602"),
        (reply(chunked(b"")), "empty reply"),
        (hold, "silent for 0.2 s"),
    ],
)
def test_what_a_server_does_wrong_is_one_line_after_the_last_try(
    script: Callable[[socket.socket, Request], None], message: str
) -> None:
    with Loopback(script) as server:
        step = api_step(server, tries=2, timeout_seconds=0.2)
        assert message in failure(lambda: step(rows(1)))
        assert len(server.requests) == 2


def test_after_a_failure_only_the_failed_text_is_asked_for_again() -> None:
    lock, count = threading.Lock(), Counter[str]()

    def second_is_broken(connection: socket.socket, request: Request) -> None:
        text = json.loads(request.body)["input"]
        with lock:
            count[text] += 1
        connection.sendall(status(500) if text == "two" else chunked(PCM.tobytes()))

    records = [first_attempt(text, "en", {"source": "test"}) for text in ("one", "two", "three")]
    with Loopback(second_is_broken) as server:
        step = api_step(server, tries=1)
        with pytest.raises(NexusError):
            step(records)
        for record in (records[0], records[2]):
            assert isinstance(step([record])[0], Record)
        with pytest.raises(NexusError):
            step([records[1]])
    assert count == {"one": 1, "two": 2, "three": 1}


def test_tokens_come_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with Loopback(reply(chunked(PCM.tobytes()))) as server:
        monkeypatch.delenv("SPEECH_TOKEN", raising=False)
        assert "$SPEECH_TOKEN, given none" in failure(lambda: api_step(server, token_env="SPEECH_TOKEN"), BadConfig)
        monkeypatch.setenv("SPEECH_TOKEN", "secret")
        api_step(server, token_env="SPEECH_TOKEN")(rows(1))
        assert server.requests[0].headers["authorization"] == "Bearer secret"


def listed(folder: Path, *lines: dict[str, str]) -> CosyVoicePool:
    (folder / "speakers.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return CosyVoicePool(type="cosyvoice", url="http://127.0.0.1:9", speakers=str(folder / "speakers.jsonl"))


def test_all_modes_of_cosyvoice_are_asked_for_as_listed(tmp_path: Path) -> None:
    time_axis = np.arange(32_000) / 16_000
    write_wav(tmp_path / "anna.wav", (0.3 * np.sin(400 * time_axis)).astype(np.float32), 16_000)
    pool = listed(
        tmp_path,
        {"id": "a", "mode": "sft", "language": "en", "speaker": "英文女"},
        {"id": "b", "mode": "zero_shot", "language": "en", "prompt": "anna.wav", "prompt_text": "hello"},
        {"id": "c", "mode": "cross_lingual", "language": "zh", "prompt": "anna.wav"},
        {"id": "d", "mode": "instruct", "language": "en", "prompt": "anna.wav", "instruction": "sadly"},
    )
    with Loopback(reply(chunked(PCM.tobytes()))) as server:
        step = build(SpeakConfig(pools={"en": pool.model_copy(update={"url": server.url})}))
        step.setup()
        results = step(rows(24))
        lines = {result.meta["voice"]: set() for result in results if isinstance(result, Record)}
        for result, request in zip(results, server.requests, strict=True):
            lines[result.meta["voice"]].add(request.line.split()[1])  # type: ignore[union-attr]
    assert lines == {
        "a": {"/inference_sft"},
        "b": {"/inference_zero_shot"},
        "c": {"/inference_cross_lingual"},
        "d": {"/inference_instruct2"},
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "a", "mode": "sft", "language": "en"}, "mode sft needs speaker"),
        ({"id": "a", "mode": "zero_shot", "language": "en", "prompt": "a.wav"}, "needs prompt_text"),
        ({"id": "a", "mode": "sft", "language": "zh", "speaker": "x"}, "speaks 'zh', expected 'en'"),
        ({"id": "a", "mode": "sing", "language": "en"}, "no speaker"),
    ],
)
def test_a_listed_speaker_that_cannot_speak_is_named_with_its_line(
    tmp_path: Path, line: dict[str, str], message: str
) -> None:
    said = failure(lambda: speakers_of(listed(tmp_path, line), "en", 0), BadRecord)
    assert said.startswith(f"{tmp_path}/speakers.jsonl:1: ") and message in said


def test_a_list_with_one_id_twice_is_refused(tmp_path: Path) -> None:
    line = {"id": "a", "mode": "sft", "language": "en", "speaker": "x"}
    assert "different ids" in failure(lambda: speakers_of(listed(tmp_path, line, line), "en", 0), BadConfig)
