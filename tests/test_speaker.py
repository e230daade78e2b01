"""Speaker similarity with a model of the user's: a real one of transformers, as small as it can be."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suites import answers, lines
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

from nexus.errors import BadCheckpoint, BadConfig
from nexus.eval.run import evaluate
from nexus.media import write_wav


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        tdnn_dim=(8, 8),
        tdnn_kernel=(3, 1),
        tdnn_dilation=(1, 1),
        xvector_output_dim=8,
    )
    path = tmp_path_factory.mktemp("speaker") / "wavlm"
    WavLMForXVector(config).save_pretrained(path)
    Wav2Vec2FeatureExtractor().save_pretrained(path)
    return path


def voice(path: Path, pitch_hz: float) -> Path:
    time = np.arange(16_000) / 16_000
    path.parent.mkdir(parents=True, exist_ok=True)
    write_wav(path, (0.3 * np.sign(np.sin(2 * np.pi * pitch_hz * time))).astype(np.float32), 16_000)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, pitch_hz in (("a", 110.0), ("b", 310.0)):
        voice(tmp_path / f"{name}.wav", pitch_hz)
    lines(tmp_path / "meta.lst", ["u1|one two|a.wav", "u2|three four|b.wav"])
    return tmp_path


def similarity(data: Path, given: list[dict[str, str]], folder: Path) -> dict[str, Any]:
    name = lines(data / "given.jsonl", given)
    report = evaluate(f"answers:{name}", "seed-tts", data, data / "out", recogniser="pocketsphinx", speaker=folder)
    assert report["card"]["speaker"] == "wavlm wavlm"
    return dict(report["seed_tts"]["speaker"])


def test_the_prompt_itself_is_the_same_voice_and_a_missing_answer_counts_nothing(folder: Path, data: Path) -> None:
    score = similarity(data, [{"id": "u1", "audio": "a.wav"}], folder)
    assert score["similarity_of_given"] == pytest.approx(1.0, abs=1e-5)
    assert score["similarity"] == pytest.approx(0.5, abs=1e-5) and score["n"] == 2


def test_two_voices_are_less_alike_than_one(folder: Path, data: Path) -> None:
    swapped = [{"id": "u1", "audio": "b.wav"}, {"id": "u2", "audio": "a.wav"}]
    assert similarity(data, swapped, folder)["similarity"] < 0.999


def test_nothing_spoken_has_no_similarity_but_a_reason(folder: Path, data: Path) -> None:
    score = similarity(data, [{"id": "u1", "text": "one two"}], folder)
    assert score["similarity"] is None and score["reason"] == "no answer has a sound"


def test_lines_without_prompts_and_other_suites_are_refused(folder: Path, tmp_path: Path) -> None:
    lines(tmp_path / "meta.lst", ["u1|one two"])
    given = answers(tmp_path / "given.jsonl", {"u1": "one two"})
    with pytest.raises(BadConfig, match="item u1: its line names no prompt"):
        evaluate(given, "seed-tts", tmp_path, tmp_path / "out", recogniser="pocketsphinx", speaker=folder)


def test_a_folder_that_lacks_weights_or_is_none_is_refused(folder: Path, data: Path, tmp_path: Path) -> None:
    given = answers(data / "given.jsonl", {"u1": "one two"})
    for broken in (tmp_path / "nothing", shutil.copytree(folder, tmp_path / "broken")):
        (broken / "model.safetensors").unlink(missing_ok=True)
        with pytest.raises(BadCheckpoint) as refused:
            evaluate(given, "seed-tts", data, tmp_path / "o", recogniser="pocketsphinx", speaker=broken)
        assert "\n" not in str(refused.value)
