"""A model folder at half its size: what is kept, what is lost, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer

import nexus
from nexus.cli import main
from nexus.errors import BadCheckpoint
from nexus.media import load_audio
from nexus.model.folder import halve, save_model
from nexus.terminal import SHIPPED
from nexus.types import Text, Turn


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "whole"
    save_model(path, tiny_model(0, "model.voice.max_seconds=0.6"), {"scores": {"asr": 0.1}})
    tiny_tokenizer().save(path / "tokenizer.json")
    (path / "README.md").write_text("the card")
    return path


def test_half_a_folder_computes_in_float32_with_weights_that_float16_holds(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    size = halve(whole, out)
    assert size == sum(file.stat().st_size for file in out.iterdir())
    assert (out / "model.safetensors").stat().st_size < 0.55 * (whole / "model.safetensors").stat().st_size
    for name in ("config.json", "tokenizer.json", "README.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    wide, stored = load_file(whole / "model.safetensors"), load_file(out / "model.safetensors")
    loaded = nexus.load(out).model.state_dict()
    for name, tensor in wide.items():
        assert loaded[name].dtype == tensor.dtype
        if tensor.dtype == torch.float32:
            assert stored[name].dtype == torch.float16 and torch.equal(loaded[name], tensor.half().float()), name
    reply = nexus.load(out).answer_many([(Turn("user", (Text("hello"),)),)], speak=True, max_tokens=3)
    assert reply[0].pcm is not None and reply[0].pcm.dtype == "float32"


def test_the_command_says_how_large_it_is_and_refuses_what_exists(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["build", "half", str(whole), "--out", str(tmp_path / "half")]
    assert main(line) == 0 and " MB" in capsys.readouterr().out
    assert main(line) == 2 and "exists; give another --out" in capsys.readouterr().err
    assert main(["build", "half", "--out", str(tmp_path / "other")]) == 2
    assert main(["build", "half", str(tmp_path), "--out", str(tmp_path / "other")]) == 2


def test_a_weight_that_float16_does_not_hold_is_refused_by_name(whole: Path, tmp_path: Path) -> None:
    large = Path(shutil.copytree(whole, tmp_path / "large"))
    weights = load_file(large / "model.safetensors")
    weights["language.head.weight"][0, 0] = 1e6
    save_file(weights, large / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"language\.head\.weight holds values that float16 does not"):
        halve(large, tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_the_model_that_comes_along_is_small_and_answers_without_being_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 30_000_000
    for word in ("asr", "spoken", "Limits"):
        assert word.lower() in (SHIPPED / "README.md").read_text().lower(), word
    assert main(["chat", "--text", "what is three plus five", "--speak", str(tmp_path / "a.wav"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["text"].startswith("three plus five is") and load_audio(tmp_path / "a.wav").seconds > 0.3
