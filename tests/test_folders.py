"""Folders of recorded digits: which files are taken, who is left out, what is said about the rest."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from suites import digits, sound
from tiny import tiny_sound

from nexus.data.folders import recordings
from nexus.errors import BadConfig, BadMedia, BadRecord


def test_a_name_says_digit_speaker_and_index(tmp_path: Path) -> None:
    last = recordings(digits(tmp_path)).members[-1]
    assert (last.id, last.word, last.speaker, last.index) == ("2_bo_b_5", "two", "bo_b", 5)


def test_the_first_recordings_cover_all_digits_and_speakers(tmp_path: Path) -> None:
    names = [member.id for member in recordings(digits(tmp_path)).members]
    assert names[:6] == ["0_ann_0", "0_bo_b_0", "1_ann_0", "1_bo_b_0", "2_ann_0", "2_bo_b_0"]
    assert len(names) == 12


def test_speakers_in_holdout_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = recordings(digits(tmp_path), ["ann"])
    assert folder.speakers == {"bo_b": 6}
    assert folder.held_out == {"ann": 6}
    assert "6 recordings (bo_b 6); held out: ann 6" in folder.summary()


def test_files_with_other_names_are_not_used_and_said_aloud(tmp_path: Path) -> None:
    digits(tmp_path)
    for name in ("README.md", "metadata.csv", "10_ann_0.wav", "0_ann.wav", "1_ann_1.flac"):
        (tmp_path / name).write_text("something else")
    (tmp_path / "more").mkdir()
    sound(tmp_path / "more" / "3_ann_0.wav")
    folder = recordings(tmp_path)
    assert len(folder.members) == 12
    assert folder.others == ("0_ann.wav", "10_ann_0.wav", "1_ann_1.flac", "README.md", "metadata.csv")
    assert "not used: 5 files with other names (0_ann.wav, 10_ann_0.wav, 1_ann_1.flac, ...)" in folder.summary()


def test_one_speaker_alone_is_enough_and_said(tmp_path: Path) -> None:
    sound(tmp_path / "7_ann_0.wav")
    folder = recordings(tmp_path)
    assert folder.speakers == {"ann": 1}
    assert "others" not in folder.summary() and "held out" not in folder.summary()


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        (["anne"], "'anne' speaks nothing in .*, expected one of ann, bo_b; did you mean 'ann'?"),
        (["zoe"], "'zoe' speaks nothing in .*, expected one of ann, bo_b; name one of them"),
        (["bo_b", "ann"], "without ann, bo_b nobody is left in .*, which has ann, bo_b; hold out fewer"),
    ],
)
def test_a_holdout_that_cannot_be_is_refused(tmp_path: Path, holdout: list[str], message: str) -> None:
    digits(tmp_path)
    with pytest.raises(BadConfig, match=message):
        recordings(tmp_path, holdout)


def test_the_only_speaker_cannot_be_held_out(tmp_path: Path) -> None:
    sound(tmp_path / "7_ann_0.wav")
    with pytest.raises(BadConfig, match="without ann nobody is left"):
        recordings(tmp_path, ["ann"])


def test_a_folder_without_such_files_is_refused_with_their_pattern(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no sound")
    for folder, what in ((tmp_path, "holds no such file among 1"), (tmp_path / "absent", "is no folder")):
        with pytest.raises(BadRecord, match=f"{what}.*{re.escape('{digit}_{speaker}_{index}.wav')}"):
            recordings(folder)


@pytest.mark.parametrize("rate_hz", [8_000, 44_100])
def test_any_rate_and_stereo_become_mono_at_16_khz(tmp_path: Path, rate_hz: int) -> None:
    at = np.arange(rate_hz // 2) / rate_hz
    left, right = np.sin(2 * np.pi * 440 * at), np.zeros(len(at))
    soundfile.write(tmp_path / "4_ann_0.wav", np.stack([left, right], 1), rate_hz)
    heard = recordings(tmp_path).members[0].sound()
    assert heard.samples is not None
    assert (heard.rate_hz, heard.samples.shape) == (16_000, (8_000,))
    tone = np.abs(np.fft.rfft(heard.samples))
    assert tone.argmax() == 220  # of half a second: 440 Hz
    assert np.abs(heard.samples).max() == pytest.approx(0.5, abs=0.05)


def test_an_unreadable_recording_is_named(tmp_path: Path) -> None:
    (tmp_path / "5_ann_0.wav").write_bytes(b"RIFF, or so")
    with pytest.raises(BadMedia, match=r"5_ann_0\.wav"):
        recordings(tmp_path).members[0].sound()


def test_the_fingerprint_follows_what_is_used_and_not_where_it_lies(tmp_path: Path) -> None:
    here, there = recordings(digits(tmp_path / "a")), recordings(digits(tmp_path / "b"))
    assert here.fingerprint == there.fingerprint
    assert recordings(tmp_path / "a", ["ann"]).fingerprint != here.fingerprint
    other = tiny_sound(0.5, seed=99)  # as long as the one it replaces
    assert other.samples is not None
    soundfile.write(tmp_path / "b" / "0_ann_0.wav", other.samples, 16_000)
    assert recordings(tmp_path / "b").fingerprint != here.fingerprint
