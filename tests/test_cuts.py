"""Manifests of lhotse: cuts become rows of recognition, and nothing that a manifest names is run or fetched."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from files import sound_file, tone
from tiny import tiny_recipe, tiny_tokenizer

from nexus.data.chat import render
from nexus.data.cuts import Cuts
from nexus.data.importing import Checked, check, import_
from nexus.data.sources import sources
from nexus.errors import BadConfig, BadRecord, NexusError
from nexus.media import load
from nexus.training import DataConfig, SourceConfig
from nexus.types import Audio, Sample, Text, Turn

SPECS = tiny_recipe().model


def cut(
    number: int, source: dict[str, Any], words: tuple[str, ...] = ("two plus", "three"), **more: Any
) -> dict[str, Any]:
    """Half a second out of a recording of two seconds at 8 kHz."""
    said = [
        {
            "id": f"s{n}",
            "recording_id": "r",
            "start": 0.2 * n,
            "duration": 0.2,
            "channel": 0,
            "text": text,
            "speaker": "ann",
        }
        for n, text in enumerate(words)
    ]
    recording = {"id": "r", "sources": [{"channels": [0], **source}], "sampling_rate": 8000}
    recording |= {"num_samples": 16_000, "duration": 2.0, "channel_ids": [0]}
    made = {"id": f"cut-{number}", "start": 0.5 * number, "duration": 0.5, "channel": 0}
    return {**made, "supervisions": said[::-1], "recording": recording, "type": "MonoCut", **more}


@pytest.fixture
def recording(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "recording.wav"
    path.write_bytes(sound_file(tone(2.0, 8000), 8000))
    return {"type": "file", "source": str(path)}


def manifest(folder: Path, *cuts: Any) -> Path:
    path = folder / "cuts.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(cut) + "\n" for cut in cuts).encode()))
    return path


def words(sample: Sample) -> str:
    (part,) = sample.turns[1].parts
    assert isinstance(part, Text)
    return part.text


def test_cuts_are_rows_of_recognition_with_the_lengths_of_their_batches(
    tmp_path: Path, recording: dict[str, str]
) -> None:
    pytest.importorskip("lhotse", reason="lhotse is not installed (extra corpora)")
    path = manifest(tmp_path, *(cut(n, recording) for n in range(3)))
    source = Cuts(path, tiny_tokenizer(), SPECS)
    assert len(source) == 3 and len(Cuts(path, tiny_tokenizer(), SPECS, limit=2)) == 2
    for n in range(3):
        sample = source[n]
        sound = sample.turns[0].parts[0]
        assert isinstance(sound, Audio) and sound.samples is not None and sound.rate_hz == 8000
        assert sound.samples.shape == (4000,)
        assert (sample.id, sample.task, words(sample)) == (f"cut-{n}", "asr", "two plus three")
        assert sample.meta == {"speakers": ["ann"]}
    assert source.lengths.audio_seconds.tolist() == [0.5] * 3
    shown = [Turn(turn.role, tuple(load(part) for part in turn.parts)) for turn in source[0].turns]
    assert len(render(shown, tiny_tokenizer(), SPECS).tokens) == source.lengths.tokens[0]
    (found,) = sources(_config(path), "sft", tiny_tokenizer(), SPECS, tmp_path)
    assert isinstance(found, Cuts) and found.fingerprint == source.fingerprint


def _config(path: Path) -> DataConfig:
    return DataConfig(train=str(path))


def test_cuts_are_imported_with_their_stretch_of_sound(tmp_path: Path, recording: dict[str, str]) -> None:
    pytest.importorskip("lhotse", reason="lhotse is not installed (extra corpora)")
    gone = {"type": "file", "source": str(tmp_path / "gone.wav")}
    path = manifest(tmp_path, cut(0, recording), cut(1, gone), cut(2, recording))
    bad: list[tuple[int, str]] = []
    result = import_(path, tmp_path / "rows.jsonl", lambda line, reason: bad.append((line, reason)))
    assert (result.rows, result.good, result.bad, result.heard_seconds) == (3, 2, 1, 1.0)
    assert [line for line, _ in bad] == [2] and "gone.wav" in bad[0][1] and "\n" not in bad[0][1]
    again = check(tmp_path / "rows.jsonl", lambda line, reason: pytest.fail(reason))
    assert again == Checked(2, 2, 0, 1.0, 0.0, None)


@pytest.mark.parametrize(
    ("source", "more", "words"),
    [
        (None, {"duration": 0.0}, "cut"),
        ({"type": "command", "source": "touch {folder}/run"}, {}, "given by a command"),
        ({"type": "url", "source": "https://example.org/a.wav"}, {}, "given by a url"),
        ({"type": "file", "source": "s3://bucket/a.wav"}, {}, "the address 's3://bucket/a.wav'"),
        (None, {"type": "MixedCut"}, "expected a MonoCut, given 'MixedCut'"),
        (None, {"supervisions": []}, "no words"),
        (None, {"recording": None}, "no recording"),
        (None, {"duration": "long"}, "no cut"),
    ],
)
def test_a_cut_that_is_no_words_in_a_file_is_refused(
    tmp_path: Path, recording: dict[str, str], source: Any, more: dict[str, Any], words: str
) -> None:
    pytest.importorskip("lhotse", reason="lhotse is not installed (extra corpora)")
    if source is not None:
        source = {**source, "source": source["source"].format(folder=tmp_path)}
    path = manifest(tmp_path, cut(0, recording), {**cut(1, source or recording), **more})
    with pytest.raises(NexusError) as caught:
        Cuts(path, tiny_tokenizer(), SPECS)
    assert str(caught.value).startswith(f"{path}:2: ") and words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_without_lhotse_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lhotse", "lhotse.serialization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadConfig, match=r"nexus-omni\[corpora\]"):
        Cuts(manifest(tmp_path), tiny_tokenizer(), SPECS)


def test_files_of_other_kinds_are_sent_to_the_importer(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="nexus data import"):
        sources(_config(tmp_path / "rows.json"), "sft", tiny_tokenizer(), SPECS, tmp_path)
    with pytest.raises(BadConfig, match="names no file"):
        sources(_config(tmp_path).model_copy(update={"train": ()}), "sft", tiny_tokenizer(), SPECS, tmp_path)
    with pytest.raises(BadRecord, match="No such file"):
        sources(_config(tmp_path / "rows.jsonl"), "sft", tiny_tokenizer(), SPECS, tmp_path)


def test_a_file_may_belong_to_some_stages(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "what is red", "response": "a colour"}\n')
    config = DataConfig(train=(SourceConfig(path=str(rows), stages=("align",)),))
    assert len(sources(config, "align", tiny_tokenizer(), SPECS, tmp_path / "cache")) == 1
    with pytest.raises(BadConfig, match="names no file for stage sft"):
        sources(config, "sft", tiny_tokenizer(), SPECS, tmp_path / "cache")
