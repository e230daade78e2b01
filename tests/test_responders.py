"""Whoever is examined answers through one protocol: recorded answers, a server, a model folder."""

import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import Loopback, Script, failure
from suites import chat, lines, says, sound, spoken
from tiny import tiny_film, tiny_model, tiny_picture, tiny_sound, tiny_tokenizer

from nexus.engines.json_http import JsonServer, PassingError
from nexus.errors import BadConfig, BadMedia, BadRecord, NexusError
from nexus.eval.responders import ChatEndpoint, ModelFolder, RecordedAnswers, responder_of
from nexus.media import load_audio
from nexus.model.folder import save_model
from nexus.types import Audio, Part, Sample, Text, Turn


def asked(*parts: Part, key: str = "a") -> Sample:
    return Sample(key, "", (Turn("user", parts),))


HELLO = asked(Text("hello"))


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Loopback]]:
    with contextlib.ExitStack() as servers:
        yield lambda script: servers.enter_context(Loopback(script))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(path, tiny_model(), {})
    tiny_tokenizer().save(path / "tokenizer.json")
    return path


# Recorded answers


def recorded(tmp_path: Path, *rows: str | dict[str, Any]) -> RecordedAnswers:
    return RecordedAnswers(lines(tmp_path / "given.jsonl", rows))


def test_recorded_texts_and_sounds_come_back_by_id_and_absent_ones_are_missing(tmp_path: Path) -> None:
    sound(tmp_path / "said" / "b.wav")
    given = recorded(tmp_path, {"id": "a", "text": ""}, "", {"id": "b", "audio": "said/b.wav"})
    a, b, c = given.answer([asked(Text("?"), key=key) for key in "abc"], speak=False)
    assert (a.text, a.audio, a.is_missing) == ("", None, False)
    assert b.text is None and b.audio is not None and b.audio.path == tmp_path / "said" / "b.wav"
    assert c.is_missing


def test_the_fingerprint_of_answers_depends_on_their_sounds_and_not_on_their_place(tmp_path: Path) -> None:
    prints = []
    for place, seed in (("x", 0), ("y", 0), ("z", 1)):
        sound(tmp_path / place / "b.wav", seed=seed)
        prints.append(recorded(tmp_path / place, {"id": "b", "audio": "b.wav"}).identity["fingerprint"])
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (['{"id": "a"}'], ":1: expected a text or an audio, given neither"),
        (['{"id": "a", "text": null, "audio": null}'], ":1: expected a text or an audio, given neither"),
        (['{"text": "x"}'], ":1: key 'id' is missing"),
        (['{"id": 1, "text": "x"}'], ":1: id: expected a text, given 1"),
        (['{"id": "a", "text": 5}'], ":1: text: expected a text, given 5"),
        (['{"id": "a", "txt": "x"}'], ":1: unknown key 'txt'"),
        (['{"id": "a", "text": "x", "complete": 1}'], "complete: expected true or false, given 1"),
        (['{"id": "a", "text": "x"}', "", '{"id": "a", "text": "y"}'], ":3: id 'a' stands in line 1 already"),
        (['{"id": "a", "audio": "gone.wav"}'], "gone.wav; paths are relative"),
        (["{"], ":1: is no JSON"),
        (["[1]"], ":1: expected a JSON object, given [1]"),
        ([], "holds no answers"),
    ],
)
def test_rows_that_are_no_answers_are_refused_with_their_line(tmp_path: Path, rows: list[str], words: str) -> None:
    said = failure(lambda: recorded(tmp_path, *rows), BadRecord)
    assert said.startswith(str(tmp_path / "given.jsonl")) and words in said


def test_answers_to_another_suite_are_refused(tmp_path: Path) -> None:
    given = recorded(tmp_path, {"id": "a", "text": "x"}, {"id": "z", "text": "x"})
    given.check(["a", "z", "more"])
    assert "given.jsonl:2: no item 'z' in this suite of 1" in failure(lambda: given.check(["a"]), BadRecord)


def test_a_file_of_answers_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert "cannot be read" in failure(lambda: responder_of(f"answers:{tmp_path}/none.jsonl"), BadRecord)


# Servers


def test_words_sound_and_pictures_go_to_a_server_as_its_protocol_has_them(
    serve: Callable[[Script], Loopback],
) -> None:
    server = serve(says(chat("Paris")))
    picture = tiny_picture(28, 28)
    (answer,) = responder_of(f"openai:{server.url}/v1#tiny", token="sesame").answer(
        [asked(picture, tiny_sound(0.3), Text("where?"))], speak=False
    )
    assert (answer.text, answer.audio, answer.complete) == ("Paris", None, True)
    (request,) = server.requests
    assert request.line == "POST /v1/chat/completions HTTP/1.1"
    assert request.headers["authorization"] == "Bearer sesame"
    body = json.loads(request.body)
    assert (body["model"], body["temperature"], body["max_tokens"], "modalities" in body) == ("tiny", 0, 256, False)
    seen, heard, read = body["messages"][0]["content"]
    assert seen["image_url"]["url"].startswith("data:image/png;base64,")
    received = load_audio(base64.b64decode(heard["input_audio"]["data"]))
    assert received.samples is not None and received.rate_hz == 16_000 and len(received.samples) == 4800
    assert read == {"type": "text", "text": "where?"}


def test_speech_is_asked_for_and_comes_back_as_sound(serve: Callable[[Script], Loopback]) -> None:
    server = serve(says(chat(None, spoken())))
    (answer,) = ChatEndpoint(server.url, "m").answer([HELLO], speak=True)
    assert answer.text == "said aloud"
    assert answer.audio is not None and answer.audio.samples is not None and len(answer.audio.samples) == 6400
    assert json.loads(server.requests[0].body)["modalities"] == ["text", "audio"]


def test_an_answer_that_was_cut_is_not_complete(serve: Callable[[Script], Loopback]) -> None:
    server = serve(says(chat("so lo", finish="length")))
    assert not ChatEndpoint(server.url, "m").answer([HELLO], speak=False)[0].complete


@pytest.mark.parametrize(
    ("script", "words", "kind"),
    [
        (says({"error": "no such model"}, "404 Not Found"), "expected status 200, given 404", NexusError),
        (says(b"<html>"), "expected JSON, given <html>", NexusError),
        (says({"choices": []}), "expected choices[0].message", NexusError),
        (says([1]), "expected choices[0].message", NexusError),
        (
            says(chat("x") | {"choices": [{"message": {"content": 5}}]}),
            "expected content to be a text, given 5",
            NexusError,
        ),
        (lambda connection, request: None, "closed the connection without an answer", PassingError),
        (
            lambda connection, request: connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}"),
            "broke off",
            PassingError,
        ),
    ],
)
def test_what_a_server_does_wrong_is_one_line_with_item_and_address(
    serve: Callable[[Script], Loopback], script: Script, words: str, kind: type[NexusError]
) -> None:
    server = serve(script)
    said = failure(lambda: ChatEndpoint(server.url, "m").answer([HELLO], speak=False), kind)
    assert said.startswith(f"item a: {server.url}") and words in said


@pytest.mark.parametrize(
    ("audio", "words"), [(None, "sound was asked for, given none"), ({"data": "é"}, "is no base64")]
)
def test_sound_that_does_not_come_is_said(
    serve: Callable[[Script], Loopback], audio: dict[str, str] | None, words: str
) -> None:
    reply = chat("x")
    reply["choices"][0]["message"]["audio"] = audio
    server = serve(says(reply))
    assert words in failure(lambda: ChatEndpoint(server.url, "m").answer([HELLO], speak=True))


def test_a_server_that_stays_silent_is_not_waited_for_forever(serve: Callable[[Script], Loopback]) -> None:
    server = serve(says({}, seconds=1.0))
    assert "not finished after 0.2 s" in failure(
        lambda: JsonServer(server.url, None, 0.2, 1_000).ask("/x", {}), PassingError
    )


def test_a_server_is_asked_many_at_a_time_and_answers_keep_their_order(serve: Callable[[Script], Loopback]) -> None:
    everybody_is_here = threading.Barrier(8, timeout=30)  # half of them: one by one they would wait for ever

    def echo(connection: Any, request: Any) -> None:
        everybody_is_here.wait()
        says(chat(json.loads(request.body)["messages"][0]["content"][0]["text"]))(connection, request)

    server = serve(echo)
    samples = [asked(Text(f"number {index}"), key=str(index)) for index in range(16)]
    endpoint = ChatEndpoint(server.url, "m", rows=16)
    assert [answer.text for answer in endpoint.answer(samples, False)] == [f"number {i}" for i in range(16)]


def test_what_a_chat_cannot_carry_is_refused_before_it_is_sent(serve: Callable[[Script], Loopback]) -> None:
    server = serve(says(chat("x")))
    endpoint = ChatEndpoint(server.url, "m")
    assert "read nothing aloud" in failure(lambda: endpoint.answer([asked(Text("hi", aloud=True))], False), BadRecord)
    assert "give its file" in failure(lambda: endpoint.answer([asked(tiny_film())], False), BadRecord)
    assert server.requests == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere", "responder 'nowhere': no such folder; expected a model folder, openai:URL#MODEL or answers:FILE"),
        ("openai:http://127.0.0.1:1/v1", "given no model"),
        ("openai:http://127.0.0.1:1/v1#", "given no model"),
        ("openai:127.0.0.1:1#m", "server url: expected http://HOST:PORT"),
    ],
)
def test_responders_that_are_none_are_refused(spec: str, words: str) -> None:
    assert words in failure(lambda: responder_of(spec), BadConfig)


def test_rows_and_tokens_below_one_are_refused(folder: Path) -> None:
    assert "given 0 and 256" in failure(lambda: responder_of(str(folder), rows=0), BadConfig)


def test_nobody_listening_is_one_line() -> None:
    said = failure(lambda: ChatEndpoint("http://127.0.0.1:9", "m").answer([HELLO], False), PassingError)
    assert "cannot be reached" in said


# Our own model


def test_a_model_folder_answers_in_a_batch_as_it_does_alone(folder: Path) -> None:
    model = responder_of(str(folder), max_tokens=6)
    samples = [asked(tiny_sound(0.3 + index / 10, index), key=str(index)) for index in range(3)]
    together = model.answer(samples, speak=True)
    alone = [model.answer([sample], speak=True)[0] for sample in samples]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.audio is not None and other.audio is not None
        assert one.audio.samples is not None and other.audio.samples is not None
        np.testing.assert_allclose(one.audio.samples, other.audio.samples, atol=1e-4)
    assert not together[0].complete


def test_the_identity_of_a_model_is_that_of_its_files(folder: Path, tmp_path: Path) -> None:
    identity = ModelFolder(folder).identity
    assert identity["decoding"]["method"] == "greedy" and len(identity["fingerprint"]) == 16
    save_model(tmp_path / "other", tiny_model(1), {})
    tiny_tokenizer().save(tmp_path / "other" / "tokenizer.json")
    assert ModelFolder(tmp_path / "other").identity["fingerprint"] != identity["fingerprint"]


def test_a_model_that_is_asked_about_broken_sound_names_item_and_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFFnothing")
    broken = asked(Audio(path=tmp_path / "bad.wav"), key="seven")
    said = failure(lambda: ModelFolder(folder).answer([broken], False), BadMedia)
    assert "seven" in said and "bad.wav" in said
