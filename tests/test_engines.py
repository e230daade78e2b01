"""The embedded synthesiser and recogniser, the real ones."""

import math
import os
import subprocess
import sys
import threading
from collections import defaultdict

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.engines.speak import EFFECTS, Espeak, Voice, voice_pool
from nexus.engines.transcribe import PocketSphinx, bigram_arpa, transcribe_many
from nexus.errors import BadMedia, Busy, NexusError
from nexus.processes import in_processes
from nexus.types import Audio

F2 = Voice("en-us+f2")
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SENTENCES = [
    *(f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b + 1]}" for a in range(8) for b in range(8 - a)),
    *(
        f"turn {s} the {c} lamp in the {r}"
        for s in ("on", "off")
        for c in ("red", "blue")
        for r in ("kitchen", "garden")
    ),
]


@pytest.fixture(scope="module")
def espeak() -> Espeak:
    return Espeak()


@pytest.fixture(scope="module")
def ear() -> PocketSphinx:
    return PocketSphinx(SENTENCES)


def samples_of(audio: Audio) -> np.ndarray:
    assert audio.samples is not None
    return audio.samples


def size_and_sum(job: tuple[str, Voice]) -> tuple[int, float]:
    samples = samples_of(Espeak().speak(*job))
    return len(samples), float(np.abs(samples).sum())


def modules_and_pid(job: int) -> tuple[bool, int]:
    return "torch" in sys.modules, os.getpid()


def refuse_the_second(job: int) -> int:
    if job == 1:
        raise BadMedia("too dull")
    return job


# --- speak


def test_speech_is_mono_float_at_the_library_rate_and_of_plausible_length(espeak: Espeak) -> None:
    audio = espeak.speak("three plus five is eight", F2)
    assert audio.rate_hz == espeak.rate_hz == 22050
    assert espeak.version.startswith("1.")
    samples = samples_of(audio)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert 0.9 < audio.seconds < 2.5
    assert 0.1 < np.abs(samples).max() < 1.0


@pytest.mark.parametrize("name", ["en-us+f2", "en-us+klatt3", "en-us+Reed", "en-gb-scotland+m3", "cmn+f2"])
def test_the_same_words_sound_the_same_whatever_was_said_before(espeak: Espeak, name: str) -> None:
    voice = Voice(name, 170, 40, 60)
    first = samples_of(espeak.speak("ten", voice))
    espeak.speak("something else entirely", Voice("en-us+Mario", 230, 90, 99))
    assert np.array_equal(samples_of(espeak.speak("ten", voice)), first)


def test_rate_pitch_and_variant_are_heard(espeak: Espeak) -> None:
    def length(**changes: int) -> int:
        return len(samples_of(espeak.speak("turn on the lamp", Voice("en-us+m3", **changes))))

    def voiced_hz(pitch: int) -> float:
        samples = samples_of(espeak.speak("ah", Voice("en-us+m3", pitch=pitch)))
        middle = samples[len(samples) // 3 :][:2048]
        lags = np.arange(espeak.rate_hz // 400, espeak.rate_hz // 50)
        return espeak.rate_hz / lags[np.argmax([np.dot(middle[lag:], middle[:-lag]) for lag in lags])]

    assert length(rate_wpm=230) < 0.8 * length(rate_wpm=130)
    assert voiced_hz(pitch=90) > 1.3 * voiced_hz(pitch=10)
    plain, variant = (samples_of(espeak.speak("ah", Voice(name))) for name in ("en-us", "en-us+f2"))
    assert not np.array_equal(plain[:2000], variant[:2000])


def test_phonemes_are_the_international_ones_of_every_clause(espeak: Espeak) -> None:
    assert espeak.phonemes("Hello. Two lamps!", F2) == "h\u0259l\u02c8o\u028a t\u02c8u\u02d0 l\u02c8\u00e6mps"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "en-us+f2", "empty"),
        (" \n", "en-us+f2", "empty"),
        ("...", "en-us+f2", "nothing in '...' can be spoken"),
        ("a\0b", "en-us+f2", "NUL character at 1"),
        ("\ud800", "en-us+f2", "not Unicode"),
        ("hi", "en-uss+f2", r"no language 'en-uss'; the nearest are en-us\b"),
        ("hi", "en-us+klatt9", r"no variant 'klatt9'; the nearest are klatt\b"),
        ("hi", "en-us+f2+m1", "no variant 'f2[+]m1'"),
        ("hi", "en-us+../f2", "no variant"),
        ("hi", "", "no language ''"),
        ("hi", "en-us\0", "no language"),
        ("hi", "en-us" * 40, "no language"),
    ],
)
def test_unspeakable_text_and_unknown_voices_are_one_line_errors(
    espeak: Espeak, text: str, name: str, message: str
) -> None:
    for method in (espeak.speak, espeak.phonemes):
        with pytest.raises(NexusError, match=message) as caught:
            method(text, Voice(name))
        assert "\n" not in str(caught.value)


def test_voice_numbers_are_bounded_and_the_key_tells_voices_apart() -> None:
    for bad in ({"rate_wpm": 20}, {"rate_wpm": 450}, {"pitch": 100}, {"pitch_range": -1}):
        with pytest.raises(NexusError, match=next(iter(bad))):
            Voice("en-us", **bad)
    assert Voice("en-us+f2", 165, 50, 50).key() == "en-us+f2,165wpm,50p,50r"
    voices = [Voice(n, r, p, q) for n in ("en-us", "en-us+f2") for r in (99, 165) for p in (1, 11) for q in (1, 11)]
    assert len({voice.key() for voice in voices}) == len(voices)


def test_a_second_thread_is_refused_while_the_first_lives(espeak: Espeak) -> None:
    espeak.speak("mine", F2)
    caught: list[BaseException] = []

    def elsewhere() -> None:
        try:
            espeak.speak("yours", F2)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere, name="second")
    thread.start()
    thread.join()
    assert isinstance(caught[0], Busy) and "'second'" in str(caught[0])


def test_the_pool_holds_many_distinct_voices_without_effects_and_all_can_be_spoken(espeak: Espeak) -> None:
    pool = voice_pool()
    assert len(pool) == len(set(pool)) > 300
    assert {name.partition("+")[0] for name in pool} == {"en-us", "en-us-nyc", "en-gb-scotland", "en-gb-x-rp", "en-029"}
    assert not {name.partition("+")[2] for name in pool} & set(EFFECTS)
    lengths = [len(samples_of(espeak.speak("lamp", Voice(name)))) for name in pool]
    assert min(lengths) > 0.2 * espeak.rate_hz and max(lengths) < 3 * espeak.rate_hz
    with pytest.raises(NexusError, match="'tlh'; choose one of en"):
        voice_pool("tlh")


def test_many_processes_say_in_order_exactly_what_one_voice_says() -> None:
    jobs = [(f"number {n}", Voice(name)) for n, name in enumerate(voice_pool()[::6])]
    expected = [size_and_sum(job) for job in jobs]
    assert list(in_processes(size_and_sum, jobs, 2, 32)) == expected
    assert list(in_processes(size_and_sum, jobs[:3], 1, 32)) == expected[:3]
    assert list(in_processes(size_and_sum, [], 2, 32)) == []


def test_working_processes_are_others_and_do_without_torch() -> None:
    [(torch_loaded, pid)] = in_processes(modules_and_pid, [0], 1, 32)
    assert not torch_loaded and pid != os.getpid()


def test_a_failed_job_ends_the_work_and_keeps_its_kind() -> None:
    with pytest.raises(NexusError, match="no variant 'nobody'"):
        list(in_processes(size_and_sum, [("fine", F2), ("bad voice", Voice("en-us+nobody"))], 1, 32))
    with pytest.raises(BadMedia, match="too dull"):
        list(in_processes(refuse_the_second, [0, 1], 1, 32))
    with pytest.raises(NexusError, match="at least 1, got 0"):
        list(in_processes(refuse_the_second, [0], 0, 32))


SCRIPT = """
import os, sys, time
from nexus.processes import in_processes

def work(job):
    os.write(1, f"{{os.getpid()}}\\n".encode())
    time.sleep({seconds})
    return job

{guard}
    print(sum(in_processes(work, [1] * 40, 2, 32)), flush=True)
"""


def script(tmp_path, seconds: float, guard: str) -> "subprocess.Popen[str]":
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(seconds=seconds, guard=guard))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, str(file)], stdout=pipe, stderr=pipe, text=True, env=environment)


def test_a_script_without_the_main_guard_ends_with_advice(tmp_path) -> None:
    process = script(tmp_path, 0, "if True:")
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert 'outside `if __name__ == "__main__":`' in errors


def test_workers_die_with_a_killed_parent(tmp_path) -> None:
    process = script(tmp_path, 30, 'if __name__ == "__main__":')
    assert process.stdout is not None
    workers = {process.stdout.readline() for _ in range(2)}
    process.kill()
    # The sleeping workers hold the other end of this pipe: it closes when the last of them is gone.
    process.communicate(timeout=10)
    assert len(workers) == 2


# --- transcribe


def read_arpa(text: str) -> tuple[dict[str, tuple[float, float]], dict[str, dict[str, float]]]:
    ones: dict[str, tuple[float, float]] = {}
    twos: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for line in text.splitlines():
        match line.split("\t"):
            case [p, word, back]:
                ones[word] = (10 ** float(p), 10 ** float(back))
            case [p, pair]:
                history, word = pair.split()
                twos[history][word] = 10 ** float(p)
    return ones, twos


@given(
    sentences=st.lists(st.lists(st.sampled_from(NUMBERS), max_size=6).map(" ".join), min_size=1, max_size=12),
    discount=st.floats(0.05, 0.95),
)
@settings(max_examples=50, deadline=None)
def test_every_history_of_the_bigram_sums_to_one(sentences: list[str], discount: float) -> None:
    if not any(sentences):
        with pytest.raises(NexusError, match="hold no words"):
            bigram_arpa(sentences, discount)
        return
    ones, twos = read_arpa(bigram_arpa(sentences, discount))
    words = [word for word in ones if word != "<s>"]
    assert math.isclose(sum(ones[word][0] for word in words), 1, rel_tol=1e-5)
    for history in ones:
        p = {word: twos[history].get(word, ones[history][1] * ones[word][0]) for word in words}
        assert math.isclose(sum(p.values()), 1, rel_tol=1e-5)


def test_the_bigram_prefers_what_it_has_seen() -> None:
    ones, twos = read_arpa(bigram_arpa(["red lamp", "red lamp", "red door", "blue door"], 0.5))
    assert twos["red"]["lamp"] > twos["red"]["door"] > ones["red"][1] * ones["blue"][0] > 0
    assert math.isclose(twos["red"]["lamp"], (2 - 0.5) / 3 + 2 * 0.5 / 3 * ones["lamp"][0], rel_tol=1e-5)


def test_spoken_sentences_are_heard_right(espeak: Espeak, ear: PocketSphinx) -> None:
    said = SENTENCES[::4]
    heard = [ear.transcribe(espeak.speak(text, F2)) for text in said]
    assert jiwer.wer(said, heard) <= 0.1


def test_a_clip_is_heard_the_same_alone_and_after_five_others(espeak: Espeak) -> None:
    voices = ["en-us+f2", "en-us+m3", "en-gb-scotland+f3", "en-us+klatt2", "en-us+Mario", "en-029+f5"]
    noise = np.random.default_rng(0)
    clips = []
    for name, text in zip(voices, SENTENCES, strict=False):
        samples = samples_of(espeak.speak(text, Voice(name, 210)))
        clips.append(Audio(samples=samples + noise.normal(0, 0.02, len(samples)).astype(np.float32), rate_hz=22050))
    together = PocketSphinx(SENTENCES)
    after_others = [together.transcribe(clip) for clip in clips]
    assert after_others == [PocketSphinx(SENTENCES).transcribe(clip) for clip in clips]
    assert [together.transcribe(clip) for clip in reversed(clips)] == after_others[::-1]


def test_level_and_rate_of_the_sound_do_not_matter(espeak: Espeak, ear: PocketSphinx) -> None:
    said = "turn on the red lamp in the kitchen"
    audio = espeak.speak(said, F2)
    for gain in (0.02, 5.0):
        assert ear.transcribe(Audio(samples=gain * samples_of(audio), rate_hz=audio.rate_hz)) == said
    doubled = Audio(samples=np.repeat(samples_of(audio), 2), rate_hz=2 * audio.rate_hz)
    assert ear.transcribe(doubled) == said


def test_clips_without_words_are_heard_as_nothing(ear: PocketSphinx) -> None:
    rng = np.random.default_rng(0)
    clips = {
        "no samples": np.zeros(0),
        "one sample": np.ones(1),
        "10 ms": rng.normal(0, 0.1, 160),
        "silence": np.zeros(32_000),
        "constant": np.full(32_000, 0.5),
        "noise": rng.normal(0, 0.1, 32_000),
        "faint noise": rng.normal(0, 1e-4, 32_000),
    }
    for samples in clips.values():
        assert ear.transcribe(Audio(samples=samples.astype(np.float32), rate_hz=16_000)) == ""


def test_sound_that_is_no_sound_is_refused(ear: PocketSphinx) -> None:
    for bad in (math.nan, math.inf):
        samples = np.zeros(16_000, np.float32)
        samples[7] = bad
        with pytest.raises(BadMedia, match="1 of 16000 samples"):
            ear.transcribe(Audio(samples=samples, rate_hz=16_000))
    with pytest.raises(BadMedia, match=r"\[2, 100\]"):
        ear.transcribe(Audio(samples=np.zeros((2, 100), np.float32), rate_hz=16_000))
    with pytest.raises(BadMedia, match="at 0 Hz"):
        ear.transcribe(Audio(samples=np.zeros(100, np.float32)))


def test_words_outside_the_dictionary_and_bad_smoothing_are_named() -> None:
    with pytest.raises(NexusError, match="lacks '7', 'blorx';"):
        PocketSphinx(["turn blorx 7 lamp"])
    for discount in (0.0, 1.0, math.nan):
        with pytest.raises(NexusError, match="between 0 and 1"):
            PocketSphinx(["one"], discount)


def test_many_processes_hear_what_one_hears_in_order(espeak: Espeak, ear: PocketSphinx) -> None:
    clips = [espeak.speak(text, Voice("en-us+m3", 190)) for text in SENTENCES[::5]]
    expected = [ear.transcribe(clip) for clip in clips]
    assert len(set(expected)) > 5
    assert transcribe_many(SENTENCES, clips, 1) == transcribe_many(SENTENCES, clips, 2) == expected
    broken = [clips[0], Audio(samples=np.full(9000, np.nan, np.float32), rate_hz=16_000)]
    with pytest.raises(BadMedia, match="clip 1: 9000 of 9000"):
        transcribe_many(SENTENCES, broken, 1)
