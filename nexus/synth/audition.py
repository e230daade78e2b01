"""Before a run every voice is heard: those that the recogniser does not understand take no part.

A pool of settings of one synthesiser holds many that no recogniser follows; each would cost its texts all their tries.
What is said here is thrown away.
"""

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nexus.processes import in_processes
from nexus.synth.records import Record, content_id
from nexus.synth.speak import Speak
from nexus.synth.verify import Verify
from nexus.synth.voices import Speaker

CHUNK = 4  # voices handed to a process at a time
_ready: dict[str, tuple[Speak, Verify]] = {}  # of this process: the steps are loaded once, and arrive with every job


@dataclass(frozen=True)
class Auditioned:
    """One voice: how many texts it said, and how many of them passed the gate."""

    voice: str
    num_said: int
    num_passed: int
    deaf: bool  # the recogniser is; the voice takes no part


def audition(speak: Speak, verify: Verify, texts: Sequence[tuple[str, str]], processes: int) -> Iterator[Auditioned]:
    """Every voice of a language with a recogniser says texts of the corpus (text, language), drawn by the voice's id,
    until it has passed `verify.config.audition.passed` of them or cannot any more.

    The results come in the pool's order and do not depend on `processes`, which are spawned; the steps need not be set
    up. Nothing where the recipe asks for no audition. A script must call this behind `if __name__ == "__main__":`.
    """
    by_language: dict[str, list[str]] = {}
    for text, language in texts:
        by_language.setdefault(language, []).append(text)
    if not verify.config.audition.texts:
        return
    jobs = []
    for speaker in speak.voices.speakers:
        known = by_language.get(speaker.language, [])
        if speaker.language in verify.config.recognisers and known:
            drawn = random.Random(speaker.id).sample(known, min(len(known), verify.config.audition.texts))
            jobs.append((speaker, drawn))
    yield from in_processes(functools.partial(_auditioned, speak, verify), jobs, processes, CHUNK)


def _auditioned(speak: Speak, verify: Verify, job: tuple[Speaker, list[str]]) -> Auditioned:
    speaker, texts = job
    key = speak.fingerprint + verify.fingerprint
    if key not in _ready:
        _ready.clear()
        _ready[key] = (speak, verify.for_all())
        for step in _ready[key]:
            step.setup()
    speak, verify = _ready[key]
    wanted = min(verify.config.audition.passed, len(texts))
    num_said = num_passed = 0
    for text in texts:
        if num_passed >= wanted or num_passed + len(texts) - num_said < wanted:
            break
        sound = speak.say(speak.said(text, speaker.language), speaker)
        row = content_id("audition", speaker.id, text)
        [result] = verify([Record(row, text, speaker.language, sound=sound, meta={"row": row})])
        num_said += 1
        num_passed += isinstance(result, Record)
    return Auditioned(speaker.id, num_said, num_passed, num_passed < wanted)
