"""`nexus train` from the command line: rows of one's own on a model that a demo made, replayed, spoken, guarded."""

import json
from pathlib import Path

import pytest
import torch
from lab import small_lab

import nexus
from nexus.cli import main
from nexus.model.folder import save_model

ROWS = Path(__file__).resolve().parent.parent / "examples" / "own-data" / "train.jsonl"
SHORT = [f"--set=stages.{name}.steps=2" for name in ("align", "sft", "speak")]


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model folder with everything a demo says about itself."""
    lab = small_lab()
    path = tmp_path_factory.mktemp("init") / "model"
    save_model(path, lab.model, {"recipe": lab.recipe.model_dump(mode="json")})
    lab.tokenizer.save(path / "tokenizer.json")
    return path


def train(init: Path, out: Path, *more: str) -> int:
    return main(["train", "nexus-tiny", "--init", str(init), "--out", str(out), *SHORT, *more])


def own(share: float) -> list[str]:
    return [f"--set=data.train={ROWS}", f"--set=data.replay={share}", "--set=data.tokens_per_batch=4096"]


def test_own_rows_train_all_stages_and_leave_a_model_that_answers(init: Path, tmp_path: Path) -> None:
    assert train(init, tmp_path / "out", *own(0.0)) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert list(run["stages"]) == ["align", "sft", "speak"]
    assert (tmp_path / "out" / "prepared" / "index.json").is_file()
    before, after = (nexus.load(path).model.state_dict() for path in (init, tmp_path / "out" / "model"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"hearing", "vision", "language", "voice"}
    assert train(init, tmp_path / "out", *own(0.0)) == 0, "what is finished is left as it is"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "names no data"),
        (("--set=data.train=nowhere.jsonl",), "nowhere.jsonl: no such file"),
        ((*own(1.0),), "less than 1"),
        ((*own(0.0), "--set=data.root=x"), "are both given"),
        ((*own(0.0), "--set=data.noise=x"), "data.noise"),
        ((*own(0.0), "--stages=nothing"), "no stage 'nothing'"),
        (("--set=data.trian=x",), "did you mean 'train'"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(
    init: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert train(init, tmp_path / "out", *more) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nexus: ")]
    assert said in line


def test_rows_without_sound_leave_the_voice_alone_and_say_so(
    init: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "typed.jsonl"
    rows.write_text('{"query": "what is red", "response": "a colour"}\n')
    typed = [f"--set=data.train={rows}", "--set=data.replay=0.0"]
    assert train(init, tmp_path / "asked", *typed, "--stages=speak") == 2
    assert "no row has an answer with a sound" in capsys.readouterr().err
    assert train(init, tmp_path / "out", *typed) == 0
    said = capsys.readouterr().err
    assert "speak: left out" in said and "align: left out, no row has a sound" in said
    assert list(json.loads((tmp_path / "out" / "run.json").read_text())["stages"]) == ["sft"]


@pytest.mark.slow
def test_replay_and_gate_run_beside_own_rows(init: Path, tmp_path: Path) -> None:
    gate = "--set=gate={n: 6, max_drop: {text: 1.0, hearing: 1.0}}"
    assert train(init, tmp_path / "out", *own(0.5), gate) == 0
    books = sorted(path.name for path in (tmp_path / "out" / "gate").iterdir())
    assert books == ["align.json", "sft.json", "speak.json"]
