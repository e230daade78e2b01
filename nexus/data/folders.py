"""Folders of recordings whose names say what is spoken: `{digit}_{speaker}_{index}.wav`.

What a file is decides its name alone; nothing is decoded before it is asked for. Knows no model.
"""

import difflib
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus.errors import BadConfig, BadRecord
from nexus.media import load_audio
from nexus.recipe import fingerprint
from nexus.text import ONES
from nexus.types import Audio

DIGITS = ONES[:10]
PATTERN = "{digit}_{speaker}_{index}.wav"
_NAME = re.compile(r"([0-9])_(.+)_([0-9]+)\.wav")
NAMED_FILES = 3  # of those that are not used, in a message


@dataclass(frozen=True)
class Recording:
    """One spoken digit: who says it, and which of this speaker's recordings of it this is."""

    path: Path
    digit: int
    speaker: str
    index: int

    @property
    def id(self) -> str:
        """The file's name without its ending, unique in its folder."""
        return self.path.stem

    @property
    def word(self) -> str:
        """The digit as a word."""
        return DIGITS[self.digit]

    def sound(self) -> Audio:
        """Sound f32 [W] at 16 kHz, whatever rate and channels the file has. Raises BadMedia naming the file."""
        return load_audio(self.path)


@dataclass(frozen=True)
class Folder:
    """What a folder holds: `members` to be used, how many of each speaker were left out (`held_out`), and the names of
    `others`, files that are no such recordings."""

    root: Path
    members: tuple[Recording, ...]
    held_out: Mapping[str, int]
    others: tuple[str, ...]

    @property
    def speakers(self) -> dict[str, int]:
        """Recordings of each speaker that is used."""
        return dict(sorted(Counter(member.speaker for member in self.members).items()))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits over names and bytes of what is used, wherever the folder lies."""
        return fingerprint({member.path.name: _digest(member.path) for member in self.members})

    def summary(self) -> str:
        """One line for people: what is used, what is left out, and what is something else."""
        used = ", ".join(f"{name} {count:,}" for name, count in self.speakers.items())
        said = f"{self.root}: {len(self.members):,} recordings ({used})"
        if self.held_out:
            said += f"; held out: {', '.join(f'{name} {count:,}' for name, count in self.held_out.items())}"
        if self.others:
            named = ", ".join(self.others[:NAMED_FILES]) + (", ..." if len(self.others) > NAMED_FILES else "")
            said += f"; not used: {len(self.others):,} files with other names ({named})"
        return said


def recordings(root: Path, holdout: Sequence[str] = ()) -> Folder:
    """Every `{digit}_{speaker}_{index}.wav` of a folder (not below it) but those of the speakers in `holdout`.

    They come by index first, then digit and speaker, so that the first few cover all digits and speakers. Raises
    BadRecord for a folder that is none or holds no such file, BadConfig for a speaker in `holdout` who is not there, or
    without whom nobody is left.
    """
    if not root.is_dir():
        raise BadRecord(f"{root}: is no folder, expected one of {PATTERN}; name the folder of the sounds")
    files = sorted(path for path in root.iterdir() if path.is_file())
    named = [(match, path) for path in files if (match := _NAME.fullmatch(path.name))]
    if not named:
        raise BadRecord(
            f"{root}: holds no such file among {len(files):,}, expected {PATTERN} (0_ann_1.wav is Ann's zero); name "
            "the folder of the sounds"
        )
    found = [Recording(path, int(match[1]), match[2], int(match[3])) for match, path in named]
    found.sort(key=lambda one: (one.index, one.digit, one.speaker))
    counts = Counter(one.speaker for one in found)
    _check(root, holdout, counts)
    used = tuple(one for one in found if one.speaker not in holdout)
    others = tuple(path.name for path in files if not _NAME.fullmatch(path.name))
    return Folder(root, used, {name: counts[name] for name in dict.fromkeys(holdout)}, others)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(root: Path, holdout: Sequence[str], counts: Mapping[str, int]) -> None:
    there = ", ".join(sorted(counts))
    for name in holdout:
        if name not in counts:
            close = difflib.get_close_matches(name, counts, n=1, cutoff=0.5)
            meant = f"; did you mean {close[0]!r}?" if close else "; name one of them or leave it out"
            raise BadConfig(f"data.holdout: {name!r} speaks nothing in {root}, expected one of {there}{meant}")
    if set(holdout) == set(counts):
        raise BadConfig(
            f"data.holdout: without {', '.join(sorted(set(holdout)))} nobody is left in {root}, which has {there}; "
            "hold out fewer speakers, or add recordings of another"
        )
