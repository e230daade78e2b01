"""The command `nexus` as a user meets it: exit codes, one-line mistakes, files and keys."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import NARROW, tiny_film, tiny_model, tiny_picture, tiny_recipe, tiny_sound, tiny_tokenizer

import nexus
from nexus.cli import main
from nexus.media import write_wav
from nexus.model.folder import save_model
from nexus.sight import png_bytes

ROOT = Path(__file__).resolve().parent.parent
NEXUS = [sys.executable, "-m", "nexus"]
VERBS = ("demo", "chat", "show")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def shell(command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A line typed into bash, where the first failure of a pipe is the exit code."""
    line = f"set -o pipefail; {command.replace('nexus', f'{sys.executable} -m nexus', 1)}"
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=100)


def save(folder: Path, *overrides: str) -> Path:
    torch.set_num_threads(1)
    recipe = tiny_recipe(*overrides)
    model = tiny_model(0, *overrides)
    if model.voice is not None:
        with torch.no_grad():  # an untrained voice that speaks up to its limit
            model.voice.heads.weight[model.voice.eos] = 0.0
    save_model(folder, model, {"recipe": recipe.model_dump(mode="json")})
    tiny_tokenizer().save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small file of each kind."""
    import av

    folder = tmp_path_factory.mktemp("media")
    sound, picture, film = tiny_sound(0.8), tiny_picture(), tiny_film(6)
    assert sound.samples is not None and picture.pixels is not None and film.frames is not None
    write_wav(folder / "question.wav", sound.samples, 16_000)
    (folder / "picture.png").write_bytes(png_bytes(picture.pixels))
    with av.open(str(folder / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4, width=84, height=84, pix_fmt="yuv420p")
        for frame in film.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return {"audio": folder / "question.wav", "image": folder / "picture.png", "video": folder / "film.mp4"}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of a command that is a user's mistake."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nexus: ") and err.endswith("\n") and err.count("\n") == 1, (out, err)
    return err


def asked(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, object]:
    """The JSON of an answered question."""
    assert main(["chat", *map(str, arguments), "--json", "--max-tokens", "5"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"text", "audio", "seconds"} and set(answer["seconds"]) == {"first_sound", "total"}
    assert isinstance(answer["text"], str)
    return answer


# --- help, versions, mistakes


def test_help_is_printed_for_the_command_and_for_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for asking in ([], ["--help"]):
        assert main(asking) == 0
        out = capsys.readouterr().out
        assert all(verb in out for verb in VERBS)
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        out, err = capsys.readouterr()
        assert f"nexus {verb}" in out and "--" in out and err == ""


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["nexus", nexus.__version__]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["shout"], "shout"),
        (["demo", "--colour", "red"], "--colour"),
        (["chat", "--text"], "--text"),
        (["chat", "m", "--max-tokens", "many"], "many"),
        (["show"], "what"),
        (["show", "nexus-huge"], "nexus-tiny"),
        (["show", "nexus-tiny", "--set", "model.hearing.max_second=3"], "max_seconds"),
        (["show", "nexus-tiny", "--set", "novalue"], "KEY=VALUE"),
        (["demo", "--minutes", "0", "--out", "nowhere"], "minutes"),
        (["demo", "--minutes", "nan", "--out", "nowhere"], "minutes"),
        (["chat", "no/such/folder", "--text", "what"], "no/such/folder"),
        (["chat", "m", "--text", "what", "--max-tokens", "0"], "at least 1"),
        (["chat", "m", "--text", "what", "--speak", "answer.mp3"], "wav"),
        (["chat", "m", "--text", "what", "--speak", "no/such/folder/answer.wav"], "no/such/folder"),
        (["chat", "m", "--read-aloud"], "--text"),
        (["chat", "m", "--read-aloud", "--text", "two", "--audio", "a.wav"], "--read-aloud"),
        (["chat", "m", "--json"], "question"),
        (["chat", "m", "--text", "two \udcff three"], "UTF-8"),
    ],
)
def test_a_mistake_in_the_command_is_one_line_and_exit_2(
    arguments: list[str],
    names: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert names in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut off"])
def test_a_damaged_model_folder_is_one_line(
    name: str, damage: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / name).read_bytes()
    match damage:
        case "missing":
            (tmp_path / name).unlink()
        case "empty":
            (tmp_path / name).write_bytes(b"")
        case "garbage":
            (tmp_path / name).write_bytes(bytes(range(256)) * 4)
        case "cut off":
            (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert str(tmp_path) in refused(capsys, "chat", tmp_path, "--text", "what")


# --- chat


def test_a_question_of_all_kinds_is_answered_in_words_and_sound(
    model: Path, media: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [argument for kind, path in media.items() for argument in (f"--{kind}", path)]
    answer = asked(capsys, model, *files, "--text", "what is left", "--speak", tmp_path / "answer.wav")
    assert answer["text"] and answer["audio"] == str(tmp_path / "answer.wav")
    seconds = answer["seconds"]
    assert isinstance(seconds, dict) and 0 < seconds["first_sound"] < seconds["total"] < 60
    with wave.open(str(tmp_path / "answer.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        assert 0.1 < file.getnframes() / 16_000 < 6.5
        assert np.frombuffer(file.readframes(file.getnframes()), "<i2").any()
    assert [path.name for path in tmp_path.iterdir()] == ["answer.wav"]


@pytest.mark.parametrize("kind", ["audio", "image", "video"])
def test_each_kind_of_file_can_be_asked_about_alone(
    kind: str, model: Path, media: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(capsys, model, f"--{kind}", media[kind])["audio"] is None


def test_the_speech_file_has_the_rate_of_the_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "model", "model.codec.rate_hz=24000")
    asked(capsys, folder, "--text", "what", "--speak", tmp_path / "answer.wav")
    with wave.open(str(tmp_path / "answer.wav")) as file:
        assert file.getframerate() == 24_000


def test_words_are_read_aloud_into_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = asked(capsys, model, "--read-aloud", "--text", "two plus three", "--speak", tmp_path / "said.wav")
    assert answer["text"] == "" and (tmp_path / "said.wav").stat().st_size > 1000


def test_the_answer_is_printed_and_a_cut_is_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(model), "--text", "what is two", "--max-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n") and out.strip()
    assert "not whole" in err and "2 tokens" in err and err.count("\n") == 1


def test_a_model_without_a_voice_answers_in_words_but_does_not_speak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mute = save(tmp_path / "mute", "model.voice=null", "model.codec=null")
    answer = asked(capsys, mute, "--text", "what")
    assert answer["seconds"]["first_sound"] is None  # type: ignore[index]
    for asking in (["--text", "what", "--speak", tmp_path / "a.wav"], ["--text", "what", "--read-aloud"]):
        assert "voice" in refused(capsys, "chat", mute, *asking)
    assert not (tmp_path / "a.wav").exists()


def test_a_session_goes_on_after_mistakes_and_remembers_until_new(
    model: Path,
    media: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions = [
        "what is two",
        f"@{media['audio']}",
        f"@{media['image']} @{media['video']} what is left",
        "",
        f"@{tmp_path / 'missing.wav'} what",
        "@strange.xyz what",
        "what is two",
        "/new",
        "what is two",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions) + "\n"))
    assert main(["chat", str(model), "--max-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    answers = out.splitlines()
    assert len(answers) == 5, out
    assert answers[4] == answers[0] != answers[3], "after /new the same question has the same answer, before it not"
    mistakes = [line for line in err.splitlines() if "not whole" not in line]
    assert len(mistakes) == 2 and "missing.wav" in mistakes[0] and ".xyz" in mistakes[1]


@pytest.mark.parametrize("locale", [{"LC_ALL": "C.UTF-8"}, {"PYTHONIOENCODING": "utf-8:strict"}])
def test_a_session_that_is_no_text_ends_with_one_line(model: Path, locale: dict[str, str]) -> None:
    done = subprocess.run(
        [*NEXUS, "chat", str(model)], input=b"\xff\xfe\n", cwd=ROOT, env=environment() | locale,
        capture_output=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2 and b"UTF-8" in done.stderr and done.stderr.count(b"\n") == 1


# --- show


def test_show_names_organs_rates_and_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "nexus-tiny", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {"parameters", "rates_hz", "stages", "plan"}
    parameters = shown["parameters"]
    assert set(parameters) == {"vision", "language", "hearing", "voice", "codec", "total"}
    assert set(parameters["hearing"]) == {"encoder", "adapter"}
    sizes = [parameters[organ] for organ in ("vision", "language", "voice", "codec")]
    assert sum(sizes) + sum(parameters["hearing"].values()) == parameters["total"]
    assert [stage["name"] for stage in shown["stages"]] == ["align", "sft", "speak"]
    assert all(set(stage) == {"name", "trainable", "trainable_parameters"} for stage in shown["stages"])
    assert shown["stages"][2]["trainable_parameters"] == parameters["voice"]
    assert shown["stages"][0]["trainable_parameters"] == sum(parameters["hearing"].values())


def test_show_counts_what_the_model_folder_really_holds(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(model), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["parameters"]["total"] == sum(p.numel() for p in tiny_model().parameters())
    assert [stage["name"] for stage in shown["stages"]] == ["align", "sft", "speak"]
    assert "--set" in refused(capsys, "show", model, "--set", "world.heard=1")


def test_show_follows_set_and_takes_either_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [part for override in NARROW for part in ("--set", override)]
    assert main(["show", "nexus_tiny", "--json", *overrides]) == 0
    narrow = json.loads(capsys.readouterr().out)
    assert narrow["parameters"]["total"] == sum(p.numel() for p in tiny_model().parameters())
    assert main(["show", "nexus-tiny"]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("language", "hearing.encoder", "Hz", "speak"))


# --- the real process


def test_help_answers_at_once_and_loads_no_model_code() -> None:
    code = "import sys; from nexus.cli import main; c = main(['--help']); print('torch' in sys.modules); sys.exit(c)"
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False"
    assert time.perf_counter() - begin < 5  # a bare interpreter takes a few hundredths; torch alone takes seconds


def test_exit_codes_of_the_real_command() -> None:
    assert shell("nexus --version").returncode == 0
    wrong = shell("nexus shout")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "Traceback" not in wrong.stderr


def test_a_machine_that_refuses_is_exit_1_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = shell("nexus demo --out file/demo", tmp_path)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_a_reader_that_leaves_early_hears_no_complaint() -> None:
    done = shell("nexus show nexus-tiny --json | true")
    assert done.stderr == "" and done.returncode in (0, 1)
    done = shell("nexus show nexus-tiny --json | head -c 5")
    assert done.stderr == "" and done.stdout == '{\n "p'


def test_ctrl_c_during_the_demo_exits_130_with_one_line(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*NEXUS, "demo", "--out", str(tmp_path / "demo")],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    seen = process.stderr.readline()  # the corpus has begun: worker processes are speaking
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (seen, err)
    lines = err.splitlines()
    assert lines[-1] == "nexus: interrupted" and "Traceback" not in err and out == ""
    assert all(line.startswith(("corpus:", "nexus:")) for line in [seen, *lines]), err
