"""Chat texts: what is excluded without a model, what a model's answer must be, and what its server may do wrong."""

import email.utils
import json
import pickle
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from loopback import Loopback, Request, failure

from nexus.engines.chat import AnswerCache, ChatFailed, ChatModel, Patience
from nexus.engines.pcm_http import Timeouts
from nexus.errors import BadConfig, NexusError
from nexus.synth.records import Record, Rejected
from nexus.synth.rewrite import EndpointConfig, RewriteConfig, build, describe, parsed, unsuitable

HASTY = Patience(tries=3, first_pause_seconds=0.01, max_pause_seconds=0.5)
QUESTION = Record("q1", "What's the capital of France?", "en")
GOOD = {"suitable": True, "why": "", "question": "What is the capital of France?", "reply": "It is Paris."}


def http(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def completion(content: Any, finish: str = "stop") -> bytes:
    message = {"role": "assistant", "content": content}
    body = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }
    return http("200 OK", json.dumps(body).encode(), "Content-Type: application/json")


def answer(**changes: Any) -> bytes:
    return completion(json.dumps(GOOD | changes))


class Server(Loopback):
    """Answers requests with the given replies in turn, the last one for ever; notes when each request came."""

    def __init__(self, *replies: bytes | Callable[[socket.socket], None]) -> None:
        self.times: list[float] = []
        self._replies = list(replies)
        super().__init__(self._reply)

    def _reply(self, connection: socket.socket, request: Request) -> None:
        self.times.append(time.monotonic())
        reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        if isinstance(reply, bytes):
            connection.sendall(reply)
        else:
            reply(connection)


def model(server: Loopback, **options: Any) -> ChatModel:
    timeouts = Timeouts(1.0, 0.3, 1.0)
    return ChatModel(f"{server.url}/v1", "test-model", **({"timeouts": timeouts, "patience": HASTY} | options))


def ask(server: Loopback, **options: Any) -> str:
    return model(server, **options).complete([{"role": "user", "content": "hello 你好"}], temperature=0.5)


def failed(server: Loopback, **options: Any) -> tuple[str, str]:
    """Reason and message of the failure that asking must end with."""
    with pytest.raises(ChatFailed) as caught:
        ask(server, **options)
    assert "\n" not in str(caught.value)
    return caught.value.reason, str(caught.value)


# The endpoint


def test_a_request_is_what_the_protocol_says_byte_by_byte() -> None:
    with Server(completion("hi")) as server:
        assert ask(server, token="secret") == "hi"
    (request,) = server.requests
    assert request.line == "POST /v1/chat/completions HTTP/1.1"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["authorization"] == "Bearer secret"
    assert request.body == (
        b'{"model": "test-model", "messages": [{"role": "user", "content": "hello \\u4f60\\u597d"}], '
        b'"temperature": 0.5}'
    )


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        ("server_error", http("500 Internal Server Error", b"out of memory")),
        ("server_error", http("503 Service Unavailable", b"")),
        ("rate_limited", http("429 Too Many Requests", b"slow down")),
        ("no_json", http("200 OK", b"<html>starting</html>", "Content-Type: text/html")),
        ("no_json", http("200 OK", b'{"choices": [{"mess')),
        ("no_connection", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
        ("no_connection", b""),
        ("no_connection", b"SSH-2.0-OpenSSH_9.6\r\n"),
    ],
)
def test_what_may_pass_is_asked_again_and_at_last_told(reason: str, bad: bytes) -> None:
    with Server(bad, bad, completion("hi")) as server:
        assert ask(server) == "hi"
    assert len(server.requests) == 3
    with Server(bad) as server:
        given, message = failed(server)
    assert given == reason and "try 3 of 3" in message and server.url in message
    assert len(server.requests) == 3


def test_a_silent_server_is_left_after_the_stated_time() -> None:
    with Server(lambda connection: time.sleep(1.5)) as server:
        begun = time.monotonic()
        reason, message = failed(server, patience=Patience(tries=1))
        assert time.monotonic() - begun < 1.4
    assert reason == "timed_out" and "silence_seconds" in message


def test_a_server_that_drips_is_left_after_the_total_time() -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        for _ in range(30):
            time.sleep(0.1)
            connection.sendall(b" ")

    with Server(drip) as server:
        reason, message = failed(server, patience=Patience(tries=1))
    assert reason == "timed_out" and "total_seconds" in message


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_pause_that_a_server_asks_for_is_kept(form: str) -> None:
    later = email.utils.formatdate(time.time() + 3, usegmt=True) if form == "date" else "0.4"
    busy = http("429 Too Many Requests", b"", f"Retry-After: {later}")
    with Server(busy, completion("hi")) as server:
        assert ask(server, patience=Patience(tries=2, first_pause_seconds=0.01, max_pause_seconds=5.0)) == "hi"
    assert server.times[1] - server.times[0] >= (1.0 if form == "date" else 0.4)


def test_a_server_that_asks_for_too_long_a_pause_is_not_waited_for() -> None:
    with Server(http("429 Too Many Requests", b"", "Retry-After: 3600")) as server:
        begun = time.monotonic()
        reason, message = failed(server)
    assert reason == "rate_limited" and "3600" in message and "max_pause_seconds" in message
    assert time.monotonic() - begun < 5 and len(server.requests) == 1


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        ("refused", http("400 Bad Request", b"context length exceeded")),
        ("refused", http("422 Unprocessable Entity", b"content policy")),
        ("cut_off", completion("half an ans", "length")),
        ("no_answer", completion(None)),
        ("no_answer", completion(["parts"])),
        ("no_answer", completion("filtered", "content_filter")),
        ("no_answer", completion("half a pair \ud800")),
        ("no_answer", http("200 OK", b'{"error": "no such thing"}')),
        ("no_answer", http("200 OK", b"[]")),
        ("no_answer", http("200 OK", b" " * (5 * 2**20))),
    ],
)
def test_what_will_not_pass_is_asked_once(reason: str, bad: bytes) -> None:
    with Server(bad) as server:
        assert failed(server)[0] == reason
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", ["401 Unauthorized", "404 Not Found", "307 Temporary Redirect"])
def test_where_no_request_can_succeed_the_user_is_told(status: str) -> None:
    with Server(http(status, b"no secret here", "Location: http://127.0.0.1:9/")) as server:
        message = failure(lambda: ask(server, token="secret"))
    assert status[:3] in message and len(server.requests) == 1
    assert "secret" not in message.replace("***", "")


def test_nobody_listening_is_said_with_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ChatFailed, match=url) as caught:
        ChatModel(url, "m", patience=HASTY).complete([])
    assert caught.value.reason == "no_connection"


def test_requests_keep_the_stated_distance() -> None:
    with Server(completion("hi")) as server:
        asked = model(server, patience=Patience(per_minute=300.0))
        for number in range(3):
            asked.complete([{"role": "user", "content": str(number)}])
    assert server.times[2] - server.times[0] >= 0.38


def test_an_answer_is_asked_for_once_and_outlives_the_process(tmp_path: Path) -> None:
    with Server(completion("first"), completion("second")) as server:
        assert ask(server, cache=AnswerCache(tmp_path / "deep" / "answers.sqlite")) == "first"
        cache = AnswerCache(tmp_path / "deep" / "answers.sqlite")
        assert ask(server, cache=cache) == "first"
        assert model(server, cache=cache).complete([{"role": "user", "content": "another"}]) == "second"
    assert len(server.requests) == 2


def test_several_workers_share_one_cache(tmp_path: Path) -> None:
    def work(worker: int) -> list[str | None]:
        cache = AnswerCache(tmp_path / "answers.sqlite")
        for number in range(20):
            cache.put(f"{worker} {number}".encode(), f"answer {worker} {number}")
            cache.put(b"the same for all", "first")
        return [cache.get(f"{worker} {number}".encode()) for number in range(20)]

    with ThreadPoolExecutor(4) as threads:
        for worker, found in enumerate(threads.map(work, range(4))):
            assert found == [f"answer {worker} {number}" for number in range(20)]


def test_failures_are_not_kept(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "answers.sqlite")
    with Server(completion("x", "length"), completion("whole")) as server:
        assert failed(server, cache=cache)[0] == "cut_off"
        assert ask(server, cache=cache) == "whole"


def test_a_cache_that_is_none_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").write_text("no database, but long enough to be looked at as one. " * 40)
    assert "answers.sqlite" in failure(lambda: AnswerCache(tmp_path / "answers.sqlite"))


@pytest.mark.parametrize("options", [{"tries": 0}, {"per_minute": 0.0}, {"max_pause_seconds": float("inf")}])
def test_impatience_that_cannot_be_meant_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match=next(iter(options))):
        Patience(**options)


# Suitability without a model


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("about_itself", "Are you an AI or a human?"),
        ("about_itself", "Who trained you, and when?"),
        ("about_itself", "What was my previous question?"),
        ("about_itself", "你是人工智能吗？"),
        ("about_a_text", "Summarize this in one sentence."),
        ("about_a_text", "According to the passage, who left?"),
        ("about_a_text", "Which of the following is a fruit?"),
        ("about_a_text", "根据这段文字，他去了哪里？"),
        ("for_the_eye", "Write a Python function that sorts"),
        ("for_the_eye", "Give me the planets in a table"),
        ("for_the_eye", "请写一段代码计算总和"),
    ],
)
def test_questions_that_do_not_suit_a_conversation_are_excluded(kind: str, text: str) -> None:
    found = unsuitable(text)
    assert found is not None and found[0] == kind and found[1] in text


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France?",
        "How do I train for a marathon?",
        "Can you write my name?",
        "Tell me about the article of faith.",
        "今天天气怎么样？",
        "你喜欢什么音乐？",
    ],
)
def test_ordinary_questions_are_not_excluded(text: str) -> None:
    assert unsuitable(text) is None


def test_without_an_endpoint_only_patterns_act_and_the_card_says_so() -> None:
    step = build(RewriteConfig())
    step.setup()
    kept, dropped = step([QUESTION, QUESTION.with_(text="Are you a robot?")])
    assert kept is QUESTION
    assert isinstance(dropped, Rejected) and dropped.reason == "unsuitable"
    assert dropped.numbers == {"by": "about_itself", "found": "Are you a robot"}
    assert describe(RewriteConfig()).startswith("rules only")


# With a model


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("no JSON object alone", "Sure! " + json.dumps(GOOD)),
        ("no JSON object alone", f"```json\n{json.dumps(GOOD)}\n```"),
        ("no JSON object alone", '{"suitable": true, "suitable": false}'),
        ("no JSON object alone", "[" * 100_000),
        ("no JSON object", "[]"),
        ("field reply is missing", json.dumps({k: v for k, v in GOOD.items() if k != "reply"})),
        ("unknown field 'more'", json.dumps(GOOD | {"more": 1})),
        ("field suitable is a str", json.dumps(GOOD | {"suitable": "true"})),
        ("field why is a NoneType", json.dumps(GOOD | {"why": None})),
    ],
)
def test_only_the_json_that_was_asked_for_is_read(said: str, text: str) -> None:
    assert parsed(text) == said


def rewritten(server: Loopback, folder: Path, *records: Record, **settings: Any) -> list[Record | Rejected]:
    endpoint = EndpointConfig(url=f"{server.url}/v1", model="m", tries=1, parallel=4, silence_seconds=0.5)
    step = build(RewriteConfig(endpoint=endpoint, **settings), folder / "answers.sqlite")
    step = pickle.loads(pickle.dumps(step))  # as it travels to a worker
    step.setup()
    return step(records)


def test_a_question_is_rewritten_and_answered_and_keeps_what_it_was(tmp_path: Path) -> None:
    with Server(answer()) as server:
        (kept,) = rewritten(server, tmp_path, QUESTION)
    assert isinstance(kept, Record)
    assert (kept.id, kept.text, kept.meta["reply"]) == ("q1", "What is the capital of France?", "It is Paris.")
    assert kept.meta["text_written"] == QUESTION.text
    assert kept.meta["rewrite"]["model"] == "m"
    asked = json.loads(server.requests[0].body)
    assert asked["response_format"] == {"type": "json_object"}
    assert asked["messages"][1] == {"role": "user", "content": QUESTION.text}
    assert "English" in asked["messages"][0]["content"]


@pytest.mark.parametrize(
    ("check", "bad"),
    [
        ("no JSON object alone", completion("Paris.")),
        ("question: wrong_language", answer(question="法国的首都是哪里？")),
        ("reply: wrong_language", answer(reply="是巴黎。")),
        ("reply: too_long", answer(reply="very " * 90 + "long")),
        ("reply: url", answer(reply="See www.example.org for the answer.")),
        ("reply: no_words", answer(reply="")),
        ("question: latex", answer(question="Please tell me what $x^2$ is")),
    ],
)
def test_an_answer_that_breaks_a_check_is_asked_for_once_more_with_another_seed(
    check: str, bad: bytes, tmp_path: Path
) -> None:
    with Server(bad, answer()) as server:
        (kept,) = rewritten(server, tmp_path, QUESTION)
    assert isinstance(kept, Record) and kept.meta["rewrite"]["again"] == 1
    assert [json.loads(request.body)["seed"] for request in server.requests] == [0, 1]
    with Server(bad) as server:
        (dropped,) = rewritten(server, tmp_path / "other", QUESTION)
    assert isinstance(dropped, Rejected) and dropped.reason == "bad_answer"
    assert dropped.numbers == {"check": check, "asked": 2}
    assert dropped.record is QUESTION


def test_the_model_may_find_a_question_unsuitable(tmp_path: Path) -> None:
    with Server(answer(suitable=False, why="needs a map", question="", reply="")) as server:
        (dropped,) = rewritten(server, tmp_path, QUESTION)
    assert isinstance(dropped, Rejected)
    assert (dropped.reason, dropped.numbers) == ("unsuitable", {"by": "m", "found": "needs a map"})


def test_a_batch_keeps_its_order_and_one_failure_takes_no_other_with_it(tmp_path: Path) -> None:
    def script(connection: socket.socket, request: Request) -> None:
        text = json.loads(request.body)["messages"][1]["content"]
        time.sleep(0.05 if "0" in text else 0)
        connection.sendall(http("500 Oh", b"") if "3" in text else answer(question=f"Spoken {text}"))

    records = [QUESTION.with_(id=str(n), text=f"question number {n} of many") for n in range(6)]
    records[4] = records[4].with_(text="Are you a robot?")
    with Loopback(script) as server:
        results = rewritten(server, tmp_path, *records)
    texts = [r.reason if isinstance(r, Rejected) else r.text.split()[3] for r in results]
    assert texts == ["0", "1", "2", "no_answer", "unsuitable", "5"]
    assert len(server.requests) == 5


def test_a_run_made_again_decides_the_same_without_asking(tmp_path: Path) -> None:
    with Server(completion("bad"), answer(), answer(question="Another?")) as server:
        first = rewritten(server, tmp_path, QUESTION)
        again = rewritten(server, tmp_path, QUESTION)
    assert first == again and len(server.requests) == 2


def test_the_fingerprint_tells_results_apart_and_not_patience() -> None:
    def of(**endpoint: Any) -> str:
        config = RewriteConfig(endpoint=EndpointConfig(**({"url": "http://a", "model": "m"} | endpoint)))
        return build(config, Path("x")).fingerprint

    assert of() == of(url="http://b", tries=9, parallel=1, token_env="T")
    assert len({of(), of(model="n"), of(temperature=0.1), of(seed=1), build(RewriteConfig()).fingerprint}) == 5


def test_a_missing_token_or_cache_is_said_before_anyone_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NEXUS_NO_TOKEN", raising=False)
    config = RewriteConfig(endpoint=EndpointConfig(url="http://a", model="m", token_env="NEXUS_NO_TOKEN"))
    assert "NEXUS_NO_TOKEN" in failure(build(config, tmp_path / "c").setup, BadConfig)
    assert "cache" in failure(lambda: build(config), BadConfig)
    assert issubclass(ChatFailed, NexusError)
