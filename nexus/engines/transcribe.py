"""The independent ear: PocketSphinx embedded, for a closed vocabulary and a bigram of given sentences.

It judges speech that the models make and has no part in their training. It hears only words of the sentences it
was given, so its error is a fair measure inside that world and means nothing outside it.

`PocketSphinx(sentences)` is strict about words; `adapt` takes any English corpus once, and `AdaptedPocketSphinx` opens
what it wrote, in as many processes as there are.
"""

import functools
import math
import re
import shutil
import tempfile
import unicodedata
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pocketsphinx
import soxr

from nexus.engines.speak import Espeak, Voice
from nexus.errors import BadMedia, NexusError
from nexus.processes import in_processes
from nexus.types import Audio

RATE_HZ = 16_000  # of the acoustic model in the wheel
FULL_SCALE = 32_767
MIN_SECONDS = 0.1  # a few frames; shorter clips cannot hold a word and upset the feature computation
CHUNK = 4  # clips handed to a process at a time
START, END = "<s>", "</s>"
DICTIONARY, BIGRAM = "words.dict", "bigram.arpa"
SPELLER = "en-us"  # espeak-ng's voice whose phonemes stand for words outside the dictionary
# espeak-ng's phonemes of American English in those of the acoustic model (ARPAbet); longer ones first.
ARPABET = {
    **{"iəɹ": "IH R", "n\u0329": "AH N", "l\u0329": "AH L", "m\u0329": "AH M", "dʒ": "JH", "tʃ": "CH", "iə": "IY AH"},
    **{"eɪ": "EY", "aɪ": "AY", "ɔɪ": "OY", "oʊ": "OW", "əʊ": "OW", "aʊ": "AW", "ɜː": "ER", "iː": "IY", "ɑː": "AA"},
    **{"ɔː": "AO", "oː": "AO", "uː": "UW", "ɜ": "ER", "ɚ": "ER", "ɝ": "ER", "i": "IY", "ɪ": "IH", "ᵻ": "IH", "ɛ": "EH"},
    **{"e": "EH", "æ": "AE", "a": "AA", "ɐ": "AH", "ə": "AH", "ʌ": "AH", "ɑ": "AA", "ɒ": "AA", "ɔ": "AO", "o": "OW"},
    **{"u": "UW", "ʊ": "UH", "θ": "TH", "ð": "DH", "ʃ": "SH", "ʒ": "ZH", "h": "HH", "ŋ": "NG", "ɲ": "N Y", "j": "Y"},
    **{"ɹ": "R", "r": "R", "ɾ": "T", "ʔ": "T", "ɡ": "G", "x": "K"},
    **{letter: letter.upper() for letter in "bdfgklmnpstvwz"},
}
_PHONEME = re.compile("|".join(map(re.escape, ARPABET)))
_UNSOUNDED = re.compile(r"\([^)]*\)|[ˈˌː\u0303ʲ\s-]")  # marks of language, stress, length, nasality and palatality


@dataclass(frozen=True)
class Heard:
    """What a recogniser made of a clip: the words, "" for none, and its confidence in 0..1, None where it has none.

    Confidences of different recognisers are different measures.
    """

    text: str
    confidence: float | None = None


@dataclass(frozen=True)
class Adaptation:
    """What `adapt` wrote: the number of words, those outside cmudict with the phonemes they were given, and those
    that could be given none and will never be heard."""

    num_words: int
    pronounced: dict[str, str]
    unsayable: tuple[str, ...]


def bigram_arpa(sentences: Iterable[str], discount: float = 0.5) -> str:
    """A back-off bigram model in ARPA format, log10, lower case, without unknown words.

    Interpolated absolute discounting: `discount` (0 < discount < 1) is taken from every bigram count and given to
    the unigrams, so p(. | history) sums to one for every history. The unigrams are Kneser and Ney's: they count in
    how many contexts a word was seen, because they only speak where the bigram was not.
    Source: Chen & Goodman 1998, section 2.7. Raises NexusError for a bad discount or no words at all.
    """
    if not 0.0 < discount < 1.0:
        raise NexusError(f"discount must lie between 0 and 1 (both excluded), got {discount}")
    followers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sentence in sentences:
        words = sentence.lower().split()
        if words:
            for history, word in zip([START, *words], [*words, END], strict=True):
                followers[history][word] += 1
    if not followers:
        raise NexusError("the sentences for the recogniser hold no words; give at least one sentence with a word")
    contexts = Counter(word for counts in followers.values() for word in counts)
    num_bigrams = contexts.total()
    unigram = {word: count / num_bigrams for word, count in contexts.items()}
    unigram_lines, bigram_lines = [], []
    for word in sorted({START, *unigram}):
        log_p = math.log10(unigram[word]) if word in unigram else -99.0
        counts = followers.get(word, Counter())
        seen = counts.total()
        spared = discount * len(counts) / seen if seen else 1.0
        unigram_lines.append(f"{log_p:.7f}\t{word}\t{math.log10(spared):.7f}")
        for follower, count in sorted(counts.items()):
            p = (count - discount) / seen + spared * unigram[follower]
            bigram_lines.append(f"{math.log10(p):.7f}\t{word} {follower}")
    head = ["\\data\\", f"ngram 1={len(unigram_lines)}", f"ngram 2={len(bigram_lines)}", ""]
    body = ["\\1-grams:", *unigram_lines, "", "\\2-grams:", *bigram_lines, "", "\\end\\", ""]
    return "\n".join(head + body)


@functools.cache
def _pronunciations() -> dict[str, list[str]]:
    """Word -> its lines of the wheel's cmudict; the variants of `read` are `read` and `read(2)`."""
    lines = Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict")).read_text(encoding="utf-8").splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        head = line.partition(" ")[0]
        found.setdefault(head.partition("(")[0], []).append(line)
    return found


def _dictionary(vocabulary: Iterable[str]) -> str:
    known = _pronunciations()
    vocabulary = sorted(vocabulary)
    missing = [word for word in vocabulary if word not in known]
    if missing:
        raise NexusError(
            f"the recogniser's dictionary (cmudict, {len(known)} words) lacks {', '.join(map(repr, missing[:8]))}"
            f"{f' and {len(missing) - 8} more' if len(missing) > 8 else ''}; "
            "write the sentences in plain English words, numbers spelled out and without punctuation"
        )
    return "".join(f"{line}\n" for word in vocabulary for line in known[word])


def _write_model(sentences: Iterable[str], discount: float, folder: Path) -> None:
    sentences = list(sentences)
    arpa = bigram_arpa(sentences, discount)
    (folder / DICTIONARY).write_text(
        _dictionary({word for sentence in sentences for word in sentence.lower().split()}), encoding="utf-8"
    )
    (folder / BIGRAM).write_text(arpa, encoding="utf-8")


def adapt(sentences: Iterable[str], folder: Path, discount: float = 0.5) -> Adaptation:
    """Write dictionary and bigram of `sentences` (normalised English) into `folder`, for `AdaptedPocketSphinx`.

    Words outside cmudict are pronounced as espeak-ng does, one by one, in its phonemes mapped to ARPAbet. Takes the
    memory of all bigrams. Raises NexusError as `bigram_arpa`, and where the folder cannot be written.
    """
    sentences = list(sentences)
    arpa = bigram_arpa(sentences, discount)
    known, espeak = _pronunciations(), Espeak()
    lines: list[str] = []
    pronounced: dict[str, str] = {}
    unsayable: list[str] = []
    words = sorted({word for sentence in sentences for word in sentence.lower().split()})
    for word in words:
        if word in known:
            lines += known[word]
        elif phones := _arpabet(word, espeak):
            pronounced[word] = phones
            lines.append(f"{word} {phones}")
        else:
            unsayable.append(word)
    try:
        (folder / DICTIONARY).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (folder / BIGRAM).write_text(arpa, encoding="utf-8")
    except OSError as error:
        raise NexusError(f"{folder}: the recogniser's model cannot be written ({error.strerror}); free it") from None
    return Adaptation(len(words), pronounced, tuple(unsayable))


def _arpabet(word: str, espeak: Espeak) -> str:
    """The word in the acoustic model's phonemes, "" where it has no sound or one that English lacks."""
    # Of other scripts espeak-ng says what they are ("Chinese letter"), as it does when it speaks: that is no reading.
    if not all(
        letter == "'" or "LATIN" in unicodedata.name(letter, "") for letter in unicodedata.normalize("NFC", word)
    ):
        return ""
    try:
        spoken = _UNSOUNDED.sub("", espeak.phonemes(word, Voice(SPELLER)))
    except NexusError:
        return ""
    if _PHONEME.sub("", spoken):
        return ""
    return " ".join(ARPABET[match[0]] for match in _PHONEME.finditer(spoken))


class PocketSphinx:
    """A recogniser for the words of `sentences` (any case, no punctuation) and the bigram they make.

    Every clip is heard by a decoder in its first state, so its text does not depend on the clips before it. Raises
    NexusError naming the words that the dictionary (cmudict) lacks. Loads in 0.2 s; one thread at a time.
    """

    def __init__(self, sentences: Iterable[str], discount: float = 0.5) -> None:
        # Kept as long as the decoder lives, which reads its files again for every clip.
        folder = Path(tempfile.mkdtemp(prefix="nexus-recogniser-"))
        weakref.finalize(self, shutil.rmtree, folder)
        _write_model(sentences, discount, folder)
        self._decoder = _decoder(folder)

    def transcribe(self, audio: Audio) -> str:
        """The words heard, lower case, "" when there are none. `audio` is loaded sound at any rate.

        Sound beyond full scale is turned down as a whole, not clipped. Raises BadMedia for NaN or infinite samples.
        """
        return _transcribe(self._decoder, audio)


class GeneralPocketSphinx:
    """The same ear without a closed vocabulary: dictionary (cmudict) and trigram of the wheel, library defaults."""

    def __init__(self) -> None:
        path = pocketsphinx.get_model_path
        self._decoder = pocketsphinx.Decoder(
            hmm=path("en-us/en-us"),
            dict=path("en-us/cmudict-en-us.dict"),
            lm=path("en-us/en-us.lm.bin"),
            loglevel="FATAL",
        )

    def transcribe(self, audio: Audio) -> str:
        """As `PocketSphinx.transcribe`."""
        return _transcribe(self._decoder, audio)


class AdaptedPocketSphinx:
    """The recogniser of a folder that `adapt` wrote, which must outlive it.

    `noise_floor_db` puts white noise that far below the power of every clip before it is heard, the same noise each
    time: sound as clean as a synthesiser's lies outside what the acoustic model learned from (measured on 20 voices
    of espeak-ng, 80 clips of real questions: 34 % pass without, 51 % at 30 dB, 43 % at 20 dB). `language_weight` is
    how much words count against sound (at 30 dB, word errors 0.34 at 6.5, 0.31 at 10).
    Raises NexusError where the folder holds no such model.
    """

    def __init__(self, folder: Path, noise_floor_db: float | None = 30.0, language_weight: float = 10.0) -> None:
        missing = [name for name in (DICTIONARY, BIGRAM) if not (folder / name).is_file()]
        if missing:
            raise NexusError(f"{folder}: expected an adapted model ({DICTIONARY}, {BIGRAM}), {missing[0]} is missing")
        self._floor_db = noise_floor_db
        self._decoder = _decoder(folder, language_weight)

    def hear(self, audio: Audio) -> Heard:
        """The words heard, lower case, and how likely they are among all that the recogniser considered: the posterior
        of the whole sequence, as the geometric mean over its words. `audio` as for `PocketSphinx.transcribe`."""
        text = _transcribe(self._decoder, audio, self._floor_db)
        if not text:
            return Heard("", 0.0)
        return Heard(text, min(1.0, self._decoder.hyp().prob ** (1 / len(text.split()))))


def transcribe_many(
    sentences: Iterable[str], audios: Sequence[Audio], processes: int, discount: float = 0.5
) -> list[str]:
    """The text of every clip, in order, by `processes` spawned processes: the same as one `PocketSphinx` would give.

    Raises NexusError as it does, with the clip's number; scripts call it behind `if __name__ == "__main__":`.
    """
    with tempfile.TemporaryDirectory(prefix="nexus-recogniser-") as folder:
        _write_model(sentences, discount, Path(folder))
        work = functools.partial(_transcribe_one, folder)
        return list(in_processes(work, list(enumerate(audios)), processes, CHUNK))


def _transcribe_one(folder: str, job: tuple[int, Audio]) -> str:
    index, audio = job
    try:
        return _transcribe(_decoder_of_process(Path(folder)), audio)
    except NexusError as error:
        raise type(error)(f"clip {index}: {error}") from error


def _transcribe(decoder: pocketsphinx.Decoder, audio: Audio, noise_floor_db: float | None = None) -> str:
    pcm = _pcm16(audio, noise_floor_db)
    if len(pcm) < MIN_SECONDS * RATE_HZ or not pcm.any():  # digital silence makes the recogniser hear "door"
        return ""
    # Noise estimate and Gaussian selection outlive an utterance: without this, scores (and at times words) depend on
    # the clips before. Resetting the features or the mean alone does not help; this takes 6 ms.
    decoder.reinit()
    decoder.start_utt()
    decoder.process_raw(pcm.tobytes(), full_utt=True)  # full: the cepstral mean is that of this very clip
    decoder.end_utt()
    heard = decoder.hyp()
    return heard.hypstr if heard else ""


def _pcm16(audio: Audio, noise_floor_db: float | None) -> np.ndarray:
    """i16 [W] at 16 kHz, with white noise that far below its power where a floor is named."""
    assert audio.samples is not None, "sound is not loaded"
    if audio.samples.ndim != 1 or audio.rate_hz <= 0:
        raise BadMedia(
            f"the recogniser takes mono sound [W] at a positive rate, got {list(audio.samples.shape)} at "
            f"{audio.rate_hz} Hz; downmix and name the rate"
        )
    bad = np.count_nonzero(~np.isfinite(audio.samples))
    if bad:
        raise BadMedia(
            f"{bad} of {len(audio.samples)} samples are NaN or infinite; repair the sound before recognition"
        )
    wave = soxr.resample(audio.samples.astype(np.float32), audio.rate_hz, RATE_HZ)
    if noise_floor_db is not None and len(wave):
        noise = np.random.default_rng(0).standard_normal(len(wave), dtype=np.float32)
        wave = wave + noise * np.float32(np.sqrt(np.square(wave).mean() / 10 ** (noise_floor_db / 10)))
    peak = max(1.0, float(np.abs(wave).max(initial=0.0)))
    return np.round(wave * (FULL_SCALE / peak)).astype(np.int16)


def _decoder(folder: Path, language_weight: float = 6.5) -> pocketsphinx.Decoder:
    """Settings by measurement: 120 held-out sentences (820 words, mean 2.1 s) of a world of 6,600, voice en-us+f2 at
    165 words a minute. Library defaults: WER 0.026, 0.081 CPU-s a clip. Without the second, flat pass: 0.022, 0.051.
    Worse from there: Gaussians from 4 to 2 (0.041), language weight 9 (0.027) or 4.5 (0.026), on the lattice 7 (0.033)
    or 12 (0.024); narrower beams (1e-30) with both passes 0.141. In white noise
    (15 dB, 30 clips) two passes are no better: 0.232 against 0.217.
    """
    return pocketsphinx.Decoder(
        hmm=pocketsphinx.get_model_path("en-us/en-us"),
        dict=str(folder / DICTIONARY),
        lm=str(folder / BIGRAM),
        lw=language_weight,
        fwdflat=False,
        loglevel="FATAL",
    )


_decoder_of_process = functools.lru_cache(maxsize=1)(_decoder)
