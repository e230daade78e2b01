"""Speech from espeak-ng, embedded: the library that the package `espeakng-loader` ships, through ctypes.

The library keeps all its state in globals (voice, rate, the phase of the pitch flutter, random numbers), so its
sound depends on everything it said before, and two threads spoil each other. Here it is loaded afresh for every
call, seeded, and unloaded (0.4 ms beside 0.8 ms of synthesis), which makes the sound a function of text and voice
alone, bit for bit on one build of the library (tested with glibc; it also holds only as long as nothing else in the
process keeps the same library open). Several processes are the way to use several cores.
"""

import _ctypes
import ctypes
import difflib
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import espeakng_loader
import numpy as np

from nexus.errors import Busy, NexusError
from nexus.types import Audio

VOLUME = 50  # half of the default, at which 83 of 425 voices run into full scale; median peak 0.39
RATE_WPM = (80, 449)  # below 80 the library clamps in silence, from 450 it changes its method (sonic)
ACCENTS = {
    "en": ("en-us", "en-us-nyc", "en-gb-scotland", "en-gb-x-rp", "en-029"),
    "cmn": ("cmn",),
}
# Effects rather than speakers: whispers, robots, growls, echoes of seconds.
EFFECTS = (
    *("whisper", "whisperf", "croak", "Demonic", "UniRobot", "anikaRobot", "fast", "Mr serious"),
    *("robosoft", *(f"robosoft{n}" for n in range(2, 9)), "RicishayMax", "RicishayMax2", "RicishayMax3"),
)

# The library's own numbers (speak_lib.h, revision 12).
_SYNCHRONOUS, _BUFFER_MS, _DONT_EXIT = 2, 60, 0x8000
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_UTF8, _IPA = 1, 2
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Voice:
    """A voice setting: `name` is language+variant ("en-us+f2") or a language alone, `rate_wpm` 80..449 words a
    minute, `pitch` and `pitch_range` 0..99. Raises NexusError for numbers outside; the name is checked on use."""

    name: str
    rate_wpm: int = 165
    pitch: int = 50
    pitch_range: int = 50

    def __post_init__(self) -> None:
        limits = {"rate_wpm": RATE_WPM, "pitch": (0, 99), "pitch_range": (0, 99)}
        for field, (low, high) in limits.items():
            if not low <= getattr(self, field) <= high:
                raise NexusError(
                    f"voice {self.name!r}: {field} must be {low} to {high}, got {getattr(self, field)}; change it"
                )

    def key(self) -> str:
        """Equal voices, equal keys, in every process and version: for identities and caches."""
        return f"{self.name},{self.rate_wpm}wpm,{self.pitch}p,{self.pitch_range}r"


class Espeak:
    """The synthesiser. Objects are cheap and hold nothing of the library, but there is one library per process.

    Only one thread of a process may use it: a second one gets `Busy` as long as the first lives.
    """

    def __init__(self) -> None:
        with _library() as (library, rate_hz):
            library.espeak_Info.restype = ctypes.c_char_p
            self.rate_hz: int = rate_hz
            self.version: str = library.espeak_Info(None).decode()

    def speak(self, text: str, voice: Voice) -> Audio:
        """`text` as mono f32 [W] at `rate_hz` (22050), within -1..1, silence at both ends left in place.

        Markup is read aloud, not obeyed. Raises NexusError for text without sound, for text holding NUL and for a
        voice that does not exist; Busy in a second thread.
        """
        data = _encoded(text)
        pieces: list[bytes] = []

        @_CALLBACK
        def collect(samples: int | None, num_samples: int, events: int) -> int:
            if samples and num_samples > 0:
                pieces.append(ctypes.string_at(samples, 2 * num_samples))
            return 0

        with _library() as (library, rate_hz):
            library.espeak_SetSynthCallback(collect)
            _choose(library, voice)
            status = library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, _UTF8, None, None)
            assert status == 0, f"espeak_Synth returned {status}"
        samples = np.frombuffer(b"".join(pieces), np.int16).astype(np.float32) / 32768
        if not samples.any():
            raise NexusError(f"nothing in {_short(text)} can be spoken by voice {voice.name!r}; give it words")
        return Audio(samples=samples, rate_hz=rate_hz)

    def phonemes(self, text: str, voice: Voice) -> str:
        """`text` in IPA, stress marked, clauses joined by a space. Raises as `speak`."""
        position = ctypes.c_char_p(_encoded(text))
        clauses = []
        with _library() as (library, _):
            _choose(library, voice)
            library.espeak_TextToPhonemes.restype = ctypes.c_char_p
            while position.value is not None:
                clauses.append(library.espeak_TextToPhonemes(ctypes.byref(position), _UTF8, _IPA).decode())
        spoken = " ".join(clause.strip() for clause in clauses if clause.strip())
        if not spoken:
            raise NexusError(f"nothing in {_short(text)} can be spoken by voice {voice.name!r}; give it words")
        return spoken


def voice_pool(language: str = "en") -> list[str]:
    """Names for `Voice`: the accents of `language`, each with every variant of the data folder that sounds like a
    speaker (not `EFFECTS`). Sorted. They are settings of one synthesiser, not people."""
    if language not in ACCENTS:
        raise NexusError(f"no voices are listed for language {language!r}; choose one of {', '.join(ACCENTS)}")
    variants = sorted(_variants() - set(EFFECTS))
    return [f"{accent}+{variant}" for accent in ACCENTS[language] for variant in variants]


_turn = threading.Lock()
_owner: threading.Thread | None = None


@contextmanager
def _library() -> Iterator[tuple[Any, int]]:
    """The library in its first state, with its sample rate. Raises Busy in a second thread."""
    global _owner
    with _turn:
        here = threading.current_thread()
        if _owner is not None and _owner is not here and _owner.is_alive():
            raise Busy(
                f"espeak-ng belongs to thread {_owner.name!r} of this process and cannot be used from {here.name!r}; "
                "use one process per speaker"
            )
        _owner = here
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        data = espeakng_loader.get_data_path()
        rate_hz = library.espeak_Initialize(_SYNCHRONOUS, _BUFFER_MS, os.fsencode(data), _DONT_EXIT)
        if rate_hz <= 0:
            raise NexusError(f"espeak-ng cannot read its data in {data}; reinstall the package espeakng-loader")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        library.srand(1)  # libc's, through the library's own link: a few variants (Reed, caleb) draw noise from it
        yield library, rate_hz
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)


def _choose(library: Any, voice: Voice) -> None:
    language, plus, variant = voice.name.partition("+")
    if language not in _languages():
        raise NexusError(_unknown(voice.name, "language", language, list(_languages())))
    # The library takes an unknown variant for none, without a word.
    if plus and variant not in _variants():
        raise NexusError(_unknown(voice.name, "variant", variant, sorted(_variants())))
    # By name the library would read all voice files first, 2 ms in which it could say a sentence; by file it has room
    # for 60 letters, which the path of an installation exceeds and that of an open file does not.
    opened = os.open(_languages()[language], os.O_RDONLY)
    try:
        status = library.espeak_SetVoiceByFile(f"/dev/fd/{opened}{plus}{variant}".encode())
    finally:
        os.close(opened)
    if status != 0:
        raise NexusError(
            f"voice {voice.name!r}: this espeak-ng has no dictionary for {language!r}; take another language"
        )
    # After the voice, which brings parameters of its own.
    for number, value in (
        (_RATE, voice.rate_wpm),
        (_VOLUME, VOLUME),
        (_PITCH, voice.pitch),
        (_RANGE, voice.pitch_range),
    ):
        status = library.espeak_SetParameter(number, value, 0)
        assert status == 0, f"espeak_SetParameter({number}, {value}) returned {status}"


def _unknown(name: str, part: str, given: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(given, known, n=4, cutoff=0.3) or known[:4]
    return f"voice {name!r}: espeak-ng has no {part} {given!r}; the nearest are {', '.join(nearest)}"


@functools.cache
def _variants() -> frozenset[str]:
    folder = Path(espeakng_loader.get_data_path(), "voices", "!v")
    return frozenset(file.name for file in folder.iterdir() if file.is_file())


@functools.cache
def _languages() -> dict[str, Path]:
    """Language -> the voice file that claims it first (a line `language en-gb 2`: lower is better, 5 if not said)."""
    claims: dict[str, tuple[int, Path]] = {}
    for file in sorted(Path(espeakng_loader.get_data_path(), "lang").rglob("*")):
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            match line.split():
                case ["language", name, *rest] if name != "variant":
                    claim = (int(rest[0]) if rest and rest[0].isdigit() else 5, file)
                    claims[name] = min(claim, claims.get(name, claim))
    return {name: file for name, (_, file) in sorted(claims.items())}


def _encoded(text: str) -> bytes:
    if not text.strip():
        raise NexusError("the text to speak is empty; give it words")
    if "\0" in text:
        raise NexusError(f"the text to speak holds a NUL character at {text.index(chr(0))}: {_short(text)}; remove it")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise NexusError(f"the text to speak is not Unicode ({error.reason}): {_short(text)}; repair it") from error


def _short(text: str) -> str:
    return ascii(text) if len(text) <= 60 else f"{text[:60]!a}... ({len(text)} characters)"
