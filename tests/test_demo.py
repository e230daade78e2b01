"""The whole loop at the smallest size: what it leaves, what it refuses, and that a kill changes nothing."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import NARROW

from nexus.bench.run import run as bench
from nexus.cli import main
from nexus.data.chat import ChatTokenizer
from nexus.demo.corpus import plan
from nexus.demo.evaluate import Exam
from nexus.demo.lab import Lab
from nexus.demo.spoken import speak
from nexus.demo.world import World
from nexus.errors import BadConfig
from nexus.model.folder import load_model, read_config
from nexus.model.omni import OmniModel
from nexus.progress import Progress
from nexus.recipe import Recipe, validate
from nexus.respond import OmniResponder
from nexus.terminal import SHIPPED

ROOT = Path(__file__).resolve().parent.parent
STANDINS, STAGES = ("codec", "sight", "backbone", "ears"), ("align", "sft", "speak")
MICRO = (
    "model.hearing.encoder.window_seconds=30.0",
    "model.voice.max_seconds=1.0",
    # Every question about a picture and every follow-up needs one recording; all else is as little as may be.
    "world={heard: 40, spoken: 30, mandarin: 8, english: 8, captioned: 12, felt: 10, looked: 234, followed: 317,"
    " pictures: 30, films: 10, test_heard: 8, test_questions: 8, test_pictures: 8, test_spoken: 6, test_mandarin: 6,"
    " test_english: 6, test_captioned: 6, test_felt: 6, test_looked: 4, test_followed: 4, test_films: 6}",
    "standins.codec.mixture={sound: 2}",
    "standins.sight.mixture={picture: 4}",
    "standins.backbone.mixture={text: 3, picture: 1, film: 1}",
    "standins.ears.mixture={asr: 3}",
    "stages.align.mixture={asr: 2, chat: 1, s2tt: 1, ser: 1, caption: 1}",
    "stages.sft.mixture={chat: 1, asr: 1, s2tt: 1, avqa: 1, multiturn: 1, picture: 1, film: 1, text: 1}",
    "stages.speak.mixture={tts: 3, s2s: 1}",
)
MEASURED = {  # the contract's keys
    "asr": ("wer",),
    "sqa": ("accuracy", "text_ceiling"),
    "vqa": ("accuracy_before_audio", "accuracy_after"),
    "avqa": ("accuracy",),
    "video": ("accuracy",),
    "multiturn": ("accuracy",),
    "s2tt": ("bleu_zh_en", "bleu_en_zh"),
    "ser": ("accuracy",),
    "caption": ("accuracy",),
    "codec": ("wer", "wer_original"),
    "tts": ("wer", "wer_original"),
    "s2s": ("answer_accuracy", "wer_own_text"),
    "first_sound": ("seconds",),
    "memory": ("peak_gib",),
    "model": ("parameters",),
    "seconds": (*STANDINS, *STAGES, "total", "cpu"),
}
SCORED = ("asr", "sqa", "vqa", "avqa", "video", "multiturn", "ser", "caption", "codec", "tts", "s2s")
OF_THE_CLOCK = ("seconds", "memory", "first_sound")  # what may differ between two runs with the same weights


def write_recipe(path: Path, *overrides: str) -> Path:
    """A demo recipe of narrow organs, few data and as few steps as the pace allows."""
    few = [
        f"{group}.{name}.min_steps=8" for group, names in (("standins", STANDINS), ("stages", STAGES)) for name in names
    ]
    recipe = Recipe.load("nexus-tiny", [*NARROW, *MICRO, *few, *overrides])
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    return path


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "nexus", "demo"),
        *("--recipe", str(recipe), "--out", str(out), "--minutes", "0.001", "--json", *more),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def demo(recipe: Path, out: Path, cores: int = 1, *more: str) -> subprocess.CompletedProcess[str]:
    """A demo in a process of its own that may use `cores` cores, which is how many threads it takes."""
    line = command(recipe, out, *more)
    if cores == 1 and shutil.which("taskset"):
        line = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *line]
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)


def read(path: Path) -> dict[str, Any]:
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(tree, dict)
    return tree


def numbers(tree: Any) -> list[float]:
    match tree:
        case bool() | str() | None:
            return []
        case int() | float():
            return [float(tree)]
        case dict():
            return [n for value in tree.values() for n in numbers(value)]
        case _:
            return [n for value in tree for n in numbers(value)]


def scores(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in OF_THE_CLOCK}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "micro.yaml")


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole micro demo."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    done = demo(recipe, out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == read(out / "report.json")
    return out


def test_the_folder_holds_what_was_promised(finished: Path) -> None:
    for name in ("report.json", "report.html", "run.json", "model/config.json", "model/model.safetensors"):
        assert (finished / name).stat().st_size > 100, name
    assert "nexus-tiny" in (finished / "model" / "README.md").read_text(encoding="utf-8")
    assert not list(finished.rglob("*.part")), "something was left half written"
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio") >= 6 and page.count("<img") >= 6 and "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page, (
        "the page needs the network"
    )


def test_the_report_holds_every_key_of_the_contract(finished: Path) -> None:
    report = read(finished / "report.json")
    assert report["schema"] == 1
    for task, keys in MEASURED.items():
        for key in keys:
            assert isinstance(report[task][key], int | float), f"{task}.{key}"
    assert all(map(math.isfinite, numbers(report)))
    for task in SCORED:
        score = report[task]
        low, high = score["ci95"]
        assert low <= high and score["n"] >= 6 and 0 <= score["baseline"] < 3, task
        assert "untrained" in score or task == "codec"
    for direction in ("zh_en", "en_zh"):
        score = report["s2tt"]
        low, high = score[f"ci95_{direction}"]
        assert 0 <= low <= high <= 100 and score[f"n_{direction}"] == 6
        assert all(0 <= score[f"{key}_{direction}"] <= 100 for key in ("bleu", "baseline", "other", "untrained"))
    for task, keys in MEASURED.items():
        for key in keys:
            assert 0 <= report[task][key] <= 1 or not key.startswith(("accuracy", "answer_accuracy")), f"{task}.{key}"
    assert 0 < report["memory"]["peak_gib"] < 16 and 0 < report["first_sound"]["seconds"] < 30
    spent = report["seconds"]
    assert 0 < max(spent[stage] for stage in (*STANDINS, *STAGES)) < spent["total"] < 300


def test_the_model_is_examined_before_training_and_before_sound(finished: Path) -> None:
    sizes = {"asr": 8, "asr_zh": 6, "s2tt_zh_en": 6, "s2tt_en_zh": 6, "caption": 6, "ser": 6, "sqa": 8, "typed": 8}
    sizes |= {"vqa": 8, "avqa": 8, "video": 6, "multiturn": 8}
    untrained = read(finished / "state" / "untrained.json")
    assert {name: len(given) for name, given in untrained["written"].items()} == sizes
    assert [len(untrained[key]) for key in ("own", "heard_tts", "heard_s2s")] == [6, 6, 6]
    before = read(finished / "state" / "before_audio.json")["written"]
    assert {name: len(given) for name, given in before.items()} == {"vqa": 8}
    assert before["vqa"] != untrained["written"]["vqa"], "the backbone has learned nothing to say"
    report = read(finished / "report.json")
    assert 0 < report["seconds"]["before_audio"] < 30 and 0 < report["seconds"]["untrained"] < 60


def test_the_run_is_recorded_beside_the_report(finished: Path) -> None:
    run = read(finished / "run.json")
    assert run["schema"] == 1 and run["machine"] and "torch" in run["versions"]
    assert set(run["stages"]) == {*STANDINS, *STAGES}
    planned = run["plan"]["steps"]
    assert {name: record["steps"] for name, record in run["stages"].items()} == planned
    for name, told in run["corpus"].items():
        states = sum(told[state] for state in ("verified", "failed", "unverified", "unchecked"))
        assert states == told["spoken"] and (told["language"] == "zh") == name.endswith("mandarin")
    assert run["corpus"]["mandarin"]["unverified"] == run["corpus"]["mandarin"]["spoken"]
    for record in run["stages"].values():
        assert record["parameters"] > 0 and record["trainable"]
    assert all(run["stages"][name]["head_parameters"] for name in ("sight", "ears", "align"))


def test_a_stage_takes_exactly_the_steps_of_the_plan(finished: Path) -> None:
    """Else a killed run, which reads the plan, would end with other weights."""
    for name, steps in read(finished / "plan.json")["steps"].items():
        assert read(finished / "state" / f"{name}.json")["curve"][-1]["step"] == steps, name


def test_the_saved_model_has_no_auxiliary_heads_and_answers(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(finished / "model" / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"language", "vision", "hearing", "voice", "codec"}
    assert (
        main(["chat", str(finished / "model"), "--text", "what is two plus three", "--max-tokens", "4", "--json"]) == 0
    )
    assert set(json.loads(capsys.readouterr().out)) == {"text", "audio", "seconds"}
    assert main(["show", str(finished / "model"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["parameters"]["total"] == read(finished / "report.json")["model"]["parameters"]


def test_a_finished_demo_called_again_is_quick_and_changes_nothing(finished: Path, recipe: Path) -> None:
    report, weights = read(finished / "report.json"), (finished / "model" / "model.safetensors").read_bytes()
    states = {path.name: path.stat().st_mtime_ns for path in (finished / "state").iterdir()}
    begin = time.perf_counter()
    again = demo(recipe, finished)
    assert again.returncode == 0, again.stderr
    assert time.perf_counter() - begin < 0.5 * report["seconds"]["total"]
    assert scores(json.loads(again.stdout)) == scores(report)
    assert scores(read(finished / "report.json")) == scores(report)
    assert (finished / "model" / "model.safetensors").read_bytes() == weights
    assert {path.name: path.stat().st_mtime_ns for path in (finished / "state").iterdir()} == states


def refused(capsys: pytest.CaptureFixture[str], recipe: Path, out: Path, *more: str) -> str:
    assert main(command(recipe, out, *more)[3:]) == 2
    printed, err = capsys.readouterr()
    assert printed == "" and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("more", "names"),
    [(["--set", "world.heard=61"], "recipe"), (["--seed", "7"], "recipe"), (["--minutes", "3"], "minutes")],
)
def test_another_run_into_the_same_folder_is_refused_and_named(
    more: list[str], names: str, finished: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "plan.json").read_bytes()
    err = refused(capsys, recipe, finished, *more)
    assert str(finished) in err and names in err and "--out" in err
    assert (finished / "plan.json").read_bytes() == before


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "something else" in refused(capsys, recipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_folders_place_is_refused(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo").write_text("a file")
    assert "demo" in refused(capsys, recipe, tmp_path / "demo")


def test_a_recipe_without_a_world_is_no_demo(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "world" in refused(capsys, recipe, tmp_path / "demo", "--set", "world=null")
    assert not (tmp_path / "demo").exists()


def test_a_mistyped_auxiliary_loss_is_refused(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage, expected in (("align", "expected some of ctc, words"), ("sft", "the stage has none")):
        err = refused(capsys, recipe, tmp_path / "demo", "--set", f"stages.{stage}.auxiliary={{word: 0.3}}")
        assert f"stages.{stage}.auxiliary: unknown loss 'word', {expected}" in err
    assert not (tmp_path / "demo").exists()


def test_two_at_once_are_told_apart(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    first = subprocess.Popen(
        command(recipe, out), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        assert first.stderr is not None and first.stderr.readline()  # it has begun
        assert "in use" in refused(capsys, recipe, out)
    finally:
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 130


# --- slow


def killed_again_and_again(recipe: Path, out: Path, moments: random.Random, kills: int) -> int:
    """Start the demo, kill -9 its process at a random moment, and so on; the last one may end. Returns the kills."""
    done = 0
    while done < kills:
        with subprocess.Popen(
            command(recipe, out), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                process.wait(moments.uniform(4.0, 16.0))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                done += 1
    assert demo(recipe, out, cores=0).returncode == 0
    return done


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_demo_killed_at_random_moments_ends_as_if_it_had_not_been(seed: int, tmp_path: Path) -> None:
    few = [
        f"{group}.{name}.min_steps=120"
        for group, names in (("standins", STANDINS), ("stages", STAGES))
        for name in names
    ]
    recipe = write_recipe(tmp_path / "micro.yaml", *few)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert demo(recipe, whole, cores=0).returncode == 0
    broken.mkdir()
    shutil.copytree(whole / "cache", broken / "cache")
    shutil.copy(whole / "plan.json", broken / "plan.json")
    (broken / ".lock").touch()  # the mark of a demo's folder
    kills = killed_again_and_again(recipe, broken, random.Random(seed), 4)
    assert kills >= 2, "the demo is over before it is killed: give it more steps"
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (whole, broken))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert scores(read(broken / "report.json")) == scores(read(whole / "report.json"))


@pytest.mark.slow
def test_a_corpus_killed_while_it_is_spoken_is_completed(tmp_path: Path) -> None:
    """With waveforms that were not copied: another history of kills, the same sounds."""
    recipe = write_recipe(tmp_path / "micro.yaml")
    digests = []
    for name, kills in (("whole", 0), ("broken", 3)):
        for _ in range(kills):
            with subprocess.Popen(
                command(recipe, tmp_path / name), cwd=ROOT, env=environment(), stderr=subprocess.PIPE
            ) as process:
                assert process.stderr is not None and process.stderr.readline()
                time.sleep(random.Random(name).uniform(0.2, 2.0))
                process.kill()
        assert demo(recipe, tmp_path / name).returncode == 0
        digests.append(read(tmp_path / name / "state" / "corpus.json")["waves"])
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_speech_comes_from_the_trained_voice_alone(tmp_path: Path) -> None:
    """With the weights of the voice drawn anew, and nothing else changed, no right answer is heard any more."""
    model, tokenizer = load_model(SHIPPED), ChatTokenizer.load(SHIPPED / "tokenizer.json")
    recipe = validate(Recipe, read_config(SHIPPED)[1]["recipe"], str(SHIPPED))
    assert recipe.world is not None
    world = World(recipe.world.seed)
    plans = plan(world, recipe.world)
    asked = speak(tmp_path / "asked", {"test_questions": plans.sets["test_questions"]}, 0.0, 2, Progress())
    exam = Exam(Lab(recipe, world, plans, asked, tokenizer, model), 2)

    def heard_right() -> float:
        _, answers = exam.talk(OmniResponder(model, tokenizer))
        (heard,) = exam.transcribe(exam.sounds(answers))
        return sum(h == item.answer for h, item in zip(heard, exam.spoken_items, strict=True)) / len(heard)

    as_trained = heard_right()
    assert as_trained > 0.3, "the model that comes along says nothing worth taking away"
    torch.manual_seed(1)
    fresh = OmniModel(recipe.model).voice
    assert model.voice is not None and fresh is not None
    model.voice.load_state_dict(fresh.state_dict())
    assert heard_right() <= 0.02


def test_the_choices_of_the_voice_are_compared_on_a_finished_demo(finished: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = bench(["voices"], tmp_path, said.append, tiny=True, demo=finished)["voices"]
    assert (
        len(result["rows"]) == len(result["variants"]) == 7
        and len({row["held_out_loss"] for row in result["rows"]}) > 4
    )
    again = bench(["voices"], tmp_path, said.append, tiny=True, demo=finished)["voices"]
    assert again["rows"] == result["rows"], "what was measured is kept"
    cases = bench(["evaluation"], tmp_path, said.append, tiny=True, demo=finished)["evaluation"]["cases"]
    assert len(cases) == 3 and all(case["ratio"] > 0 for case in cases)
    with pytest.raises(BadConfig, match="name its folder with --demo"):
        bench(["voices"], tmp_path, said.append, tiny=True)
    with pytest.raises(BadConfig, match="expected the folder of a finished demo"):
        bench(["voices"], tmp_path, said.append, tiny=True, demo=tmp_path)
