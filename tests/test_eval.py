"""`nexus eval` from a folder of data to scores, and back from a kill: real files, real processes, small numbers."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import Loopback, Request, Script
from suites import QUESTIONS, answers, chat, digits, lines, questions, replies, says, sound, spoken
from tiny import tiny_model, tiny_picture, tiny_tokenizer

from nexus.eval.compare import diff
from nexus.eval.radar import radar
from nexus.eval.run import evaluate
from nexus.model.folder import save_model
from nexus.sight import png_bytes

ROOT = Path(__file__).resolve().parent.parent
RIGHT = {key: answer for key, (_, answer) in QUESTIONS.items()}


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Loopback]]:
    with contextlib.ExitStack() as servers:
        yield lambda script: servers.enter_context(Loopback(script))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(path, tiny_model(0, "model.voice.max_seconds=0.6"), {})
    tiny_tokenizer().save(path / "tokenizer.json")
    return path


def yaml(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def items(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]


# Scores


def test_right_answers_score_one_and_others_what_their_rule_says(tmp_path: Path) -> None:
    data = questions(tmp_path / "data")
    right = evaluate(answers(tmp_path / "r.jsonl", RIGHT), "llama_questions", data, tmp_path / "r")["llama_questions"]
    assert (right["accuracy"], right["n"], right["missing"], right["text_accuracy"]) == (1.0, 5, 0, 1.0)
    assert right["ci95"] == [1.0, 1.0] and right["baseline"] == 0.2
    assert right["speech_accuracy"] is None and right["speech_reason"] == "no answer has a sound"
    some = {"1": "It is paris, I think.", "2": "5", "3": "Venus", "5": ""}
    report = evaluate(answers(tmp_path / "s.jsonl", some), "llama-questions", data, tmp_path / "s")
    scores = report["llama_questions"]
    assert (scores["accuracy"], scores["n"], scores["missing"]) == (0.4, 5, 1)
    assert report["card"]["suites"]["llama_questions"]["protocol"]["rule"] == "contains+aliases/1"
    assert [row["right"] for row in items(tmp_path / "s")] == [True, True, False, False, False]
    assert [row["missing"] for row in items(tmp_path / "s")] == [False, False, False, True, False]


def test_a_spoken_answer_counts_by_what_is_heard_and_a_text_comes_first(
    tmp_path: Path, serve: Callable[[Script], Loopback]
) -> None:
    server = serve(says({"text": "Paris."}))
    for key in "123":
        sound(tmp_path / f"{key}.wav")
    given = lines(
        tmp_path / "a.jsonl",
        [{"id": "1", "audio": "1.wav"}, {"id": "2", "text": "Five", "audio": "2.wav"}, {"id": "3", "audio": "3.wav"}],
    )
    data = questions(tmp_path / "data")
    report = evaluate(
        f"answers:{given}", "llama_questions", data, tmp_path / "out", recogniser=f"openai:{server.url}#ear"
    )
    scores = report["llama_questions"]
    assert scores["accuracy"] == 2 / 5  # Paris heard, Five read
    assert (scores["text_accuracy"], scores["speech_accuracy"], scores["missing"]) == (1 / 5, 1 / 5, 2)
    assert report["card"]["recogniser"] == f"openai:{server.url}#ear"
    sent = server.requests[0]
    assert sent.line.startswith("POST /audio/transcriptions ") and b'name="model"\r\n\r\near\r\n' in sent.body
    assert (tmp_path / "out" / items(tmp_path / "out")[0]["audio"]).is_file()


def test_sound_that_nobody_hears_is_not_measured_and_says_so(tmp_path: Path) -> None:
    sound(tmp_path / "1.wav")
    given = lines(tmp_path / "a.jsonl", [{"id": "1", "audio": "1.wav"}])
    scores = evaluate(f"answers:{given}", "llama_questions", questions(tmp_path / "data"), tmp_path / "out")
    assert scores["llama_questions"]["accuracy"] is None and "recogniser" in scores["llama_questions"]["reason"]
    assert scores["llama_questions"]["speech_reason"] == "no recogniser was given"


def test_digits_are_marked_by_word_or_figure_and_by_speaker(tmp_path: Path) -> None:
    data = digits(tmp_path / "data")
    said = {"0_ann_0": "zero", "0_bo_b_0": "It is 0.", "1_ann_0": "one or two", "1_bo_b_0": "11", "2_ann_0": "TWO!"}
    report = evaluate(answers(tmp_path / "a.jsonl", said), "digits", data, tmp_path / "o", split="test")
    scores = report["digits"]
    assert (scores["n"], scores["missing"]) == (6, 1)
    assert scores["accuracy"] == 3 / 6
    assert scores["speakers"] == {"ann": 2 / 3, "bo_b": 1 / 3}
    assert report["card"]["suites"]["digits"]["protocol"]["split"] == "index 0 to 4"
    whole = evaluate(answers(tmp_path / "b.jsonl", said), "digits", data, tmp_path / "p", limit=7)
    assert whole["digits"]["n"] == 7
    assert [row["id"] for row in items(tmp_path / "p")][:6] == [row["id"] for row in items(tmp_path / "o")]


def test_recognition_is_scored_by_language_and_scenario(tmp_path: Path) -> None:
    for name in "abc":
        sound(tmp_path / f"{name}.wav")
    rows = [
        {"id": "a", "audio": "a.wav", "text": "one two three four", "scenario": "call"},
        {"id": "b", "audio": "b.wav", "text": "five six"},
        {"id": "c", "audio": "c.wav", "text": "你好吗", "language": "zh", "scenario": "call"},
    ]
    lines(tmp_path / "clips.jsonl", rows)
    suite = yaml(tmp_path / "s.yaml", "{kind: asr, data: clips.jsonl, normalisers: {en: none}}")
    said = {"a": "one two three", "c": "你好吧"}
    report = evaluate(answers(tmp_path / "a.jsonl", said), suite, None, tmp_path / "out")
    scores = report["s"]
    assert scores["wer"] == 3 / 6 and scores["cer"] == 1 / 3 and scores["baseline"] == 1.0
    assert (scores["n"], scores["missing"]) == (3, 1)
    assert scores["groups"]["call"]["wer"] == 1 / 4 and scores["groups"]["call"]["cer"] == 1 / 3
    normalisers = report["card"]["suites"]["s"]["protocol"]["normalisers"]
    assert normalisers == {"en": "none", "zh": "speechio-zh"}


def corpora(root: Path) -> dict[str, str]:
    """One clip in every layout; its id by suite."""
    for name in (
        "libri/test-clean/1/2/1-2-3.flac",
        "aishell1/wav/test/S1/S1W1.wav",
        "aishell2/iOS/test/wav/T1.wav",
        "fleurs/audio/test/99.wav",
        "cv/clips/c.mp3",
        "sent/s.wav",
        "wenet/a/long.opus",
    ):
        sound(root / name, seconds=2.0)
    lines(root / "libri/test-clean/1/2/1-2.trans.txt", ["1-2-3 HELLO WORLD"])
    lines(root / "aishell1/transcript/aishell_transcript_v0.8.txt", ["S1W1 你 好", "S9W9 别的"])
    lines(root / "aishell2/iOS/test/wav.scp", ["T1\twav/T1.wav"])
    lines(root / "aishell2/iOS/test/trans.txt", ["T1\t你好"])
    lines(root / "fleurs/test.tsv", ["7\t99.wav\tHello world\thello world\th e\t5\tMALE"])
    lines(root / "cv/test.tsv", ["client_id\tpath\tsentence", "x\tc.mp3\t你好"])
    lines(root / "sent/transcripts.tsv", ["file\ttext", "s.wav\tHELLO WORLD"])
    segment = {"sid": "L1", "begin_time": 0.5, "end_time": 1.25, "text": "你好", "subsets": ["TEST_NET"]}
    other = {"sid": "L2", "begin_time": 0, "end_time": 1, "text": "别的", "subsets": ["DEV"]}
    lines(root / "wenet/WenetSpeech.json", [{"audios": [{"path": "a/long.opus", "segments": [segment, other]}]}])
    return {
        "librispeech": "libri 1-2-3",
        "aishell1": "aishell1 S1W1",
        "aishell2": "aishell2 iOS/T1",
        "fleurs": "fleurs 99",
        "common_voice": "cv c",
        "sentences": "sent s",
        "wenetspeech": "wenet L1",
    }


def test_every_layout_of_a_corpus_is_read(tmp_path: Path) -> None:
    for kind, place in corpora(tmp_path).items():
        folder, key = place.split()
        suite = yaml(tmp_path / f"{kind}.yaml", f"{{kind: {kind}, data: {folder}, normalisers: {{en: none}}}}")
        (tmp_path / "a.jsonl").unlink(missing_ok=True)
        scores = evaluate(answers(tmp_path / "a.jsonl", {key: "你好"}), suite, None, tmp_path / "out" / kind)[kind]
        assert scores["n"] == 1, kind
        assert scores.get("cer", 0.0) == 0.0 and scores.get("wer", 1.0) == 1.0, kind


def test_a_segment_of_a_long_recording_is_cut_out(tmp_path: Path, serve: Callable[[Script], Loopback]) -> None:
    corpora(tmp_path)
    server = serve(says(chat("你好")))
    evaluate(f"openai:{server.url}#m", "wenetspeech", tmp_path / "wenet", tmp_path / "out")
    (request,) = server.requests
    encoded = json.loads(request.body)["messages"][0]["content"][0]["input_audio"]["data"]
    assert len(encoded) * 3 // 4 == pytest.approx(44 + 2 * 12_000, abs=4)  # 0.75 s at 16 kHz


def test_translation_is_scored_in_both_directions(tmp_path: Path) -> None:
    header = "path\tsentence\ttranslation"
    sentence = "the cat sat on the red mat today"
    for folder, stem, row in (
        ("zh", "covost_v2.zh-CN_en", f"a.mp3\t猫坐着\t{sentence}"),
        ("en", "covost_v2.en_zh-CN", "b.mp3\tthe cat\t猫今天坐在红色的垫子上"),
    ):
        lines(tmp_path / "d" / folder / f"{stem}.test.tsv", [header, row])
        sound(tmp_path / "d" / folder / "clips" / row.split("\t")[0])
    said = {"zh_en/a": sentence, "en_zh/b": "狗"}
    scores = evaluate(answers(tmp_path / "a.jsonl", said), "covost2", tmp_path / "d", tmp_path / "o")["covost2"]
    assert scores["bleu_zh_en"] == pytest.approx(100) and scores["bleu_en_zh"] < 5 and scores["n"] == 2
    assert "tok:zh" in scores["groups"]["en_zh"]["signature"] and "tok:13a" in scores["groups"]["zh_en"]["signature"]


def test_synthesis_is_heard_and_what_was_not_spoken_is_all_wrong(
    tmp_path: Path, serve: Callable[[Script], Loopback]
) -> None:
    server = serve(says({"text": "Seven red circles"}))
    lines(tmp_path / "meta.lst", ["u1|seven red circles.", "u2|three blue squares"])
    sound(tmp_path / "u1.wav")
    given = lines(tmp_path / "a.jsonl", [{"id": "u1", "audio": "u1.wav"}])
    ear = f"openai:{server.url}#ear"
    scores = evaluate(f"answers:{given}", "seed-tts", tmp_path, tmp_path / "out", recogniser=ear)["seed_tts"]
    assert scores["mean_wer_percent"] == 50.0 and scores["mean_wer_percent_of_given"] == 0.0
    assert (scores["wer"], scores["missing"], scores["missing_ids"]) == (0.5, 1, ["u2"])


def test_a_picture_with_a_spoken_question_is_asked_and_shown(
    tmp_path: Path, serve: Callable[[Script], Loopback]
) -> None:
    server = serve(says(chat("a red circle")))
    pixels = tiny_picture(28, 28).pixels
    assert pixels is not None
    (tmp_path / "p.png").write_bytes(png_bytes(pixels))
    sound(tmp_path / "q.wav")
    lines(tmp_path / "tri.jsonl", [{"id": "t", "image": "p.png", "audio": "q.wav", "text": "red circle"}])
    report = evaluate(f"openai:{server.url}#m", "tri", tmp_path / "tri.jsonl", tmp_path / "out")
    assert report["tri"]["accuracy"] == 1.0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img ") == 1 and page.count("<audio ") == 1


def test_choices_are_read_with_their_options_and_unclear_replies_are_wrong(tmp_path: Path) -> None:
    sound(tmp_path / "air" / "Music_GTZAN" / "m.wav")
    entry = {
        "task_name": "Music",
        "dataset_name": "GTZAN",
        "path": "m.wav",
        "question": "Which genre?",
        "answer_gt": "jazz",
        "choice_a": "rock",
        "choice_b": "jazz",
        "uniq_id": 4,
    }
    lines(tmp_path / "air" / "Foundation_meta.json", [json.dumps([entry])])
    for text, accuracy, unparsed, of_parsed in (("B", 1.0, 0, 1.0), ("A", 0.0, 0, 0.0), ("jazz", 0.0, 1, None)):
        said = answers(tmp_path / f"{text}.jsonl", {"4": text})
        scores = evaluate(said, "air_bench", tmp_path / "air", tmp_path / text)["air_bench"]
        assert (scores["accuracy"], scores["unparsed"], scores["accuracy_of_parsed"]) == (accuracy, unparsed, of_parsed)


def test_a_judge_is_asked_once_for_each_answer_and_must_say_one_word(
    tmp_path: Path, serve: Callable[[Script], Loopback]
) -> None:
    def grade(request: Request) -> Any:
        prompt = json.loads(request.body)["messages"][0]["content"]
        return chat("Right." if "Answer: The city" in prompt else "wrong" if "Answer: Ma" in prompt else "perhaps")

    server = serve(replies(grade))
    said = {"1": "The city of light", "2": "Many", "3": "Mars", "4": "Cat"}
    spec, data, name = answers(tmp_path / "a.jsonl", said), questions(tmp_path / "d"), f"openai:{server.url}#judge"
    report = evaluate(spec, "llama_questions", data, tmp_path / "o", judge=name)
    judged = report["llama_questions"]["judge"]
    assert (judged["accuracy"], judged["undecided"], judged["n"]) == (1 / 5, 2, 5)
    assert report["llama_questions"]["accuracy"] == 1 / 5
    assert len(server.requests) == 4
    (tmp_path / "o" / ".journal.jsonl").unlink()
    assert evaluate(spec, "llama_questions", data, tmp_path / "o", judge=name) == report
    assert len(server.requests) == 4


# The folder


def test_equal_inputs_give_equal_bytes_wherever_they_lie(tmp_path: Path) -> None:
    for place in ("x", "y"):
        data = questions(tmp_path / place / "data")
        evaluate(answers(tmp_path / place / "a.jsonl", RIGHT), "llama_questions", data, tmp_path / place / "out")
    for name in ("report.json", "items.jsonl", "report.html"):
        assert (tmp_path / "x/out" / name).read_bytes() == (tmp_path / "y/out" / name).read_bytes()
    run = json.loads((tmp_path / "x/out/run.json").read_text())
    assert run["finished"] >= run["began"] and run["named"]["data"] == str(tmp_path / "x" / "data")


KILLED = """
import sys
from pathlib import Path
from nexus.eval.run import evaluate
evaluate(sys.argv[1], "llama_questions", Path(sys.argv[2]), Path(sys.argv[3]), rows=1)
"""


def test_a_killed_run_goes_on_and_leaves_the_same_files(tmp_path: Path, serve: Callable[[Script], Loopback]) -> None:
    def answer(request: Request) -> Any:
        sent = json.loads(request.body)["messages"][0]["content"][0]["input_audio"]["data"]
        return chat(list(RIGHT.values())[len(sent) % 7 % 5])

    server = serve(replies(answer, seconds=0.3))
    spec, data = f"openai:{server.url}#m", questions(tmp_path / "data")
    journal = tmp_path / "killed" / ".journal.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, spec, str(data), str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while (not journal.is_file() or journal.read_bytes().count(b"\n") < 2) and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "killed" / "report.json").exists()
    kept = journal.read_bytes().count(b"\n")
    assert 2 <= kept < 5
    with journal.open("ab") as file:
        file.write(b'{"suite": "llama_que')  # a line that the kill tore
    evaluate(spec, "llama_questions", data, tmp_path / "killed", rows=1)
    asked = len(server.requests)
    evaluate(spec, "llama_questions", data, tmp_path / "whole", rows=1)
    assert len(server.requests) == asked + 5 and asked <= 5 + 1
    for name in ("report.json", "items.jsonl", "report.html"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["resumed_items"] == kept


def test_items_are_asked_in_batches_of_like_length_and_reported_in_their_order(
    tmp_path: Path, serve: Callable[[Script], Loopback]
) -> None:
    data = questions(tmp_path / "data")
    for key, seconds in zip(QUESTIONS, (0.5, 0.1, 0.4, 0.2, 0.3), strict=True):
        sound(data / f"{key}.wav", seconds)
    server = serve(says(chat("x")))
    evaluate(f"openai:{server.url}#m", "llama_questions", data, tmp_path / "out", rows=1)
    assert [row["id"] for row in items(tmp_path / "out")] == list("12345")
    lengths = [len(request.body) for request in server.requests]
    assert lengths == sorted(lengths) and len(set(lengths)) == 5


# Several suites, and two runs


def test_several_suites_of_one_file_share_a_report_with_a_radar(
    tmp_path: Path, serve: Callable[[Script], Loopback]
) -> None:
    questions(tmp_path / "q")
    digits(tmp_path / "d")
    server = serve(says(chat("two")))
    text = "suites: {some: {kind: llama_questions, data: q, limit: 3}, all: {kind: llama-questions, data: q}, "
    suite = yaml(tmp_path / "s.yaml", text + "digits: {kind: digits, data: d, split: test}}")
    report = evaluate(f"openai:{server.url}#m", suite, None, tmp_path / "out")
    assert (report["some"]["n"], report["all"]["n"], report["digits"]["accuracy"]) == (3, 5, 1 / 3)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("As published") == 2 and "67.33" in page and "this run" in page
    assert "Scores of all suites. this run: some 0.000, all 0.000, digits 0.333" in page


def test_a_radar_puts_full_scores_on_its_rim() -> None:
    drawn = radar("t", ["a", "b<", "c", "d"], {"one": [1.0, 0.0, 0.5, 1.0]})
    assert 'd="M210.0,70.0 210.0,210.0 210.0,280.0 70.0,210.0Z"' in drawn and "b&lt;" in drawn


def test_two_runs_are_compared_item_by_item(tmp_path: Path) -> None:
    data = questions(tmp_path / "data")
    for name, said in (("a", {"1": "Paris", "2": "six", "4": "Dog"}), ("b", {"1": "Rome", "2": "five", "3": "Mars"})):
        evaluate(answers(tmp_path / f"{name}.jsonl", said), "llama_questions", data, tmp_path / name)
    change = diff(tmp_path / "a", tmp_path / "b")["llama_questions"]
    assert (change["won"], change["lost"], change["n"], change["p"]) == (["2", "3"], ["1", "4"], 5, 1.0)
    assert change["difference"] == 0 and change["ci95"][0] < 0 < change["ci95"][1]
    same = diff(tmp_path / "a", tmp_path / "a")["llama_questions"]
    assert (same["difference"], same["ci95"], same["p"], same["won"]) == (0.0, [0.0, 0.0], 1.0, [])


def test_error_rates_are_compared_pair_by_pair(tmp_path: Path) -> None:
    rows = [{"id": str(i), "audio": "a.wav", "text": "one two three four"} for i in range(8)]
    sound(tmp_path / "a.wav")
    lines(tmp_path / "c.jsonl", rows)
    suite = yaml(tmp_path / "s.yaml", "{kind: asr, data: c.jsonl, normalisers: {en: none}}")
    for name, text in (("a", "one two three"), ("b", "one two three four")):
        said = answers(tmp_path / f"{name}.jsonl", {row["id"]: text for row in rows})
        evaluate(said, suite, None, tmp_path / name)
    change = diff(tmp_path / "a", tmp_path / "b")["s"]
    assert (change["a"], change["b"], change["difference"], change["ci95"]) == (0.25, 0.0, -0.25, [-0.25, -0.25])
    assert len(change["better"]) == 8 and change["worse"] == []


# Real data


def test_real_questions_score_one_for_right_answers_and_almost_nothing_shuffled(
    real_data: Path, tmp_path: Path
) -> None:
    folder = real_data / "llama_questions"
    table = [row.split("\t") for row in (folder / "llama_questions_300.tsv").read_text().splitlines()[1:]]
    right = {row[2].strip().removesuffix(".wav"): row[1] for row in table}
    given = list(right.values())
    random.Random(0).shuffle(given)
    for name, texts, low, high in (("right", list(right.values()), 1.0, 1.0), ("shuffled", given, 0.0, 0.03)):
        spec = answers(tmp_path / f"{name}.jsonl", dict(zip(right, texts, strict=True)))
        scores = evaluate(spec, "llama_questions", folder, tmp_path / name)["llama_questions"]
        assert scores["n"] == 300 and low <= scores["accuracy"] <= high
    assert diff(tmp_path / "shuffled", tmp_path / "right")["llama_questions"]["lost"] == []


def test_an_untrained_model_goes_through_real_questions_and_digits(
    real_data: Path, tmp_path: Path, model: Path
) -> None:
    for suite, folder in (("llama_questions", "llama_questions"), ("digits", "fsdd")):
        report = evaluate(str(model), suite, real_data / folder, tmp_path / suite, limit=3, max_tokens=8, rows=2)
        assert report[suite]["n"] == 3 and report[suite]["accuracy"] < 1 and report[suite]["cut"] > 0
        assert report["card"]["responder"]["decoding"]["max_tokens"] == 8


def test_real_questions_are_heard_offline_without_being_told_what_to_hear(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "llama_questions"
    given = lines(tmp_path / "a.jsonl", [{"id": "1", "audio": os.path.relpath(folder / "1.wav", tmp_path)}])
    scores = evaluate(f"answers:{given}", "llama_questions", folder, tmp_path / "o", limit=1, recogniser="pocketsphinx")
    assert items(tmp_path / "o")[0]["heard"] == "what is the capital of france"
    assert scores["llama_questions"]["speech_accuracy"] == 0.0
    assert scores["card"]["recogniser"] == "pocketsphinx, general en-us language model"


def test_an_untrained_model_speaks_its_answers_when_somebody_listens(
    tmp_path: Path, model: Path, serve: Callable[[Script], Loopback]
) -> None:
    server = serve(says({"text": "mars"}))
    report = evaluate(
        str(model),
        "llama_questions",
        questions(tmp_path / "d"),
        tmp_path / "o",
        max_tokens=4,
        recogniser=f"openai:{server.url}#ear",
    )
    assert report["llama_questions"]["speech_accuracy"] == 1 / 5
    assert len(list((tmp_path / "o" / "audio" / "llama_questions").glob("*.wav"))) == 5


def test_what_a_server_says_aloud_is_kept_and_heard(tmp_path: Path, serve: Callable[[Script], Loopback]) -> None:
    server = serve(
        replies(lambda request: {"text": "dog"} if "transcriptions" in request.line else chat("cat", spoken()))
    )
    name = f"openai:{server.url}#m"
    report = evaluate(name, "llama_questions", questions(tmp_path / "d"), tmp_path / "o", recogniser=name)
    assert (report["llama_questions"]["text_accuracy"], report["llama_questions"]["speech_accuracy"]) == (0.2, 0.2)
