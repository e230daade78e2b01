"""The demo's examination: held-out sentences, voices, questions, pictures and films; every score beside its baselines.

Speech is judged by a recogniser that had no part in training (PocketSphinx with a bigram of the world's training
sentences); its error on the original recordings stands beside every such score.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from nexus.data.chat import task_turns
from nexus.demo.lab import Lab
from nexus.demo.mandarin import majority
from nexus.demo.manner import EMOTIONS, Manner, caption, caption_score
from nexus.demo.papers import Paper, papers
from nexus.demo.phrases import Item
from nexus.demo.prosody import pitch_energy_baseline
from nexus.engines.transcribe import transcribe_many
from nexus.eval.scores import accuracy, exact, most_frequent, others, paired_drop, word_error_rate
from nexus.eval.suites.translation import bleu
from nexus.respond import OmniResponder, Reply
from nexus.types import Audio, Turn

MAX_SECONDS = 12.0  # of one spoken reply
MAX_TOKENS = 32  # the longest sentence of the world has 18 words
LM_SENTENCES = 40_000
RECOGNISER = "pocketsphinx, bigram of the world's training sentences"
OPTIONAL = {  # task -> its main keys
    "avqa": ("accuracy",),
    "video": ("accuracy",),
    "multiturn": ("accuracy",),
    "s2tt": ("bleu_zh_en", "bleu_en_zh"),
    "ser": ("accuracy",),
    "caption": ("accuracy",),
}
BASELINE_SOUNDS = 400  # of training, for the baseline of emotions


@dataclass
class Answers:
    """Everything one model said in the examination: what it wrote, paper by paper, and what the recogniser heard."""

    written: dict[str, list[str]]
    own: list[str]  # texts of the spoken answers
    heard_tts: list[str]
    heard_s2s: list[str]


@dataclass
class Sat:
    """The examination as it was sat: all answers, and what the recogniser hears in the sounds they are held against."""

    answers: Answers
    recited: list[Reply]
    answered: list[Reply]
    coded: list[str]  # the recited sentences through the codec
    original: list[str]  # their original recordings
    best: list[str]  # the right answers, spoken by the voice that was learned


@dataclass
class Exam:
    """The test items, and what is made of the answers."""

    lab: Lab
    processes: int

    @cached_property
    def papers(self) -> dict[str, Paper]:
        """The papers of written answers."""
        return papers(self.lab)

    @property
    def recited(self) -> list[str]:
        """The held-out sentences of speech synthesis."""
        return [utterance.text for utterance in self.lab.plan.sets["test_spoken"]]

    @property
    def spoken_items(self) -> list[Item]:
        """Spoken questions whose answers are spoken as well: as many as there are recited sentences."""
        return self.lab.plan.test_questions[: len(self.recited)]

    def write(
        self,
        responder: OmniResponder,
        names: Sequence[str] | None = None,
        n: int | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> dict[str, list[str]]:
        """Written answers to the papers (default: all), to the first n items of each (default: all)."""
        written = {}
        for name in names or self.papers:
            paper = self.papers[name] if n is None else self.papers[name].first(n)
            written[name] = _texts(responder.answer_many(paper.asks, max_tokens=max_tokens))
        return written

    def talk(
        self,
        responder: OmniResponder,
        max_tokens: int = MAX_TOKENS,
        max_seconds: float = MAX_SECONDS,
        n: int | None = None,
    ) -> tuple[list[Reply], list[Reply]]:
        """Sentences read aloud, and spoken answers to spoken questions: all, or the first n."""
        aloud = [task_turns("tts", text=text)[:1] for text in self.recited[:n]]
        heard = [self.lab.waves["test_questions"][i] for i in range(len(self.spoken_items[:n]))]
        asked = [task_turns("s2s", sound=sound)[:1] for sound in heard]
        recited = responder.answer_many(aloud, True, max_tokens, max_seconds)
        return recited, responder.answer_many(asked, True, max_tokens, max_seconds)

    @torch.no_grad()
    def codec_round_trip(self) -> list[Audio]:
        """The original recordings of the recited sentences through encoder and decoder."""
        codec = self.lab.model.codec
        assert codec is not None
        sounds = []
        for wave in self.originals():
            decoded = codec.decode(codec.encode(torch.from_numpy(_samples(wave))[None, None]))[0, 0]
            sounds.append(Audio(samples=decoded.numpy(), rate_hz=codec.rate_hz))
        return sounds

    def right_answers(self) -> list[Audio]:
        """The right answers to `spoken_items`, spoken by the voice that was learned: what could be heard at best."""
        return [self.lab.waves["test_answers"][i] for i in range(len(self.spoken_items))]

    def originals(self) -> list[Audio]:
        """The original recordings of the recited sentences."""
        return [self.lab.waves["test_spoken"][i] for i in range(len(self.recited))]

    def sounds(self, replies: Sequence[Reply]) -> list[Audio]:
        """The speech of replies."""
        codec = self.lab.recipe.model.codec
        assert codec is not None
        return [Audio(samples=_pcm(reply), rate_hz=codec.rate_hz) for reply in replies]

    def transcribe(self, *groups: Sequence[Audio]) -> list[list[str]]:
        """What the independent recogniser hears in each group of sounds."""
        sentences = self.lab.world.all_sentences_for_lm(LM_SENTENCES)
        texts = transcribe_many(sentences, [sound for group in groups for sound in group], self.processes)
        heard = []
        for group in groups:
            heard.append(texts[: len(group)])
            texts = texts[len(group) :]
        return heard

    def written_scores(self, trained: Answers, untrained: Answers, before: dict[str, list[str]]) -> dict[str, Any]:
        """The scores of everything that was written; `before` the audio stages."""
        return {
            "asr": self._recognition(trained, untrained),
            "sqa": self._right("sqa", trained, untrained) | {"text_ceiling": self._share("typed", trained.written)},
            "vqa": self._pictures(trained, untrained, before),
            **{task: self._optional(task, keys, trained, untrained) for task, keys in OPTIONAL.items()},
        }

    def _optional(self, task: str, keys: Sequence[str], trained: Answers, untrained: Answers) -> dict[str, Any]:
        """The score of a task that the recipe's world may leave out; then null, with the reason."""
        if not any(name.split(".")[0].startswith(task) for name in self.papers):
            return {**dict.fromkeys(keys), "reason": f"recipe {self.lab.recipe.name} has no material for it"}
        match task:
            case "s2tt":
                return self._translation(trained, untrained)
            case "ser":
                return self._emotions(trained, untrained)
            case "caption":
                return self._captions(trained, untrained)
            case _:
                return self._right(task, trained, untrained)

    def _right(self, name: str, trained: Answers, untrained: Answers) -> dict[str, Any]:
        """Whole right answers of a paper, letter by letter; `other` with the wrong input, or somebody else's answer."""
        paper, written = self.papers[name], trained.written
        right = exact(paper.wanted, written[name])
        control = f"{name}.other"
        other = written[control] if control in written else others(written[name])
        frequent = most_frequent(paper.wanted)
        return {
            **accuracy(right),
            "baseline": float(np.mean(exact(paper.wanted, [frequent] * len(right)))),
            "other": float(np.mean(exact(paper.wanted, other))),
            "untrained": self._share(name, untrained.written),
            "families": _by_family(paper.families, right),
        }

    def _share(self, name: str, written: dict[str, list[str]]) -> float:
        given = written[name]
        return float(np.mean(exact(self.papers[name].wanted[: len(given)], given)))

    def _recognition(self, trained: Answers, untrained: Answers) -> dict[str, Any]:
        """asr: word error rate of the model's transcripts, and the character error rate of Mandarin ones."""
        wanted = self.papers["asr"].wanted
        frequent = Counter(self.lab.sentences).most_common(1)[0][0]
        given, raw = trained.written["asr"], untrained.written["asr"]
        return {
            **word_error_rate(wanted, given),
            "baseline": _wer(wanted, [frequent] * len(wanted)),
            "other": _wer(wanted, others(given)),
            "untrained": _wer(wanted[: len(raw)], raw),
            **self._mandarin(trained),
            "normaliser": "none (the world's spelling)",
        }

    def _mandarin(self, trained: Answers) -> dict[str, Any]:
        """Character error rate of Mandarin transcripts."""
        if "asr_zh" not in self.papers:
            return {}
        wanted = self.papers["asr_zh"].wanted
        return {"cer_zh": _wer(_spaced(wanted), _spaced(trained.written["asr_zh"])), "n_zh": len(wanted)}

    def _pictures(self, trained: Answers, untrained: Answers, before: dict[str, list[str]]) -> dict[str, Any]:
        """vqa: whole answers about pictures, before the audio stages and after all."""
        score = self._right("vqa", trained, untrained)
        wanted = self.papers["vqa"].wanted
        drop = paired_drop(exact(wanted, before["vqa"]), exact(wanted, trained.written["vqa"]))
        return {
            "accuracy_before_audio": self._share("vqa", before),
            "accuracy_after": score.pop("accuracy"),
            **score,
            "drop": drop["drop"],
            "drop_ci95": drop["ci95"],
        }

    def _translation(self, trained: Answers, untrained: Answers) -> dict[str, Any]:
        """s2tt: BLEU of spoken Mandarin in English, and of spoken English in Mandarin."""
        constant = majority(self.lab.pairs)
        told: dict[str, Any] = {}
        directions: tuple[tuple[str, Literal["en", "zh"], str], ...] = (
            ("zh_en", "en", constant.en),
            ("en_zh", "zh", constant.zh),
        )
        for key, target, fixed in directions:
            paper = self.papers[f"s2tt_{key}"]
            given, raw = trained.written[f"s2tt_{key}"], untrained.written[f"s2tt_{key}"]
            score = bleu(paper.wanted, given, target)
            told |= {
                f"bleu_{key}": score["bleu"],
                f"exact_{key}": self._share(f"s2tt_{key}", trained.written),
                f"ci95_{key}": score["ci95"],
                f"n_{key}": score["n"],
                f"baseline_{key}": bleu(paper.wanted, [fixed] * len(given), target)["bleu"],
                f"other_{key}": bleu(paper.wanted, others(given), target)["bleu"],
                f"untrained_{key}": bleu(paper.wanted[: len(raw)], raw, target)["bleu"],
                f"signature_{key}": score["signature"],
            }
        return told

    def _emotions(self, trained: Answers, untrained: Answers) -> dict[str, Any]:
        """ser: which of the emotions, beside a logistic regression on mean pitch and mean energy."""
        score = self._right("ser", trained, untrained)
        wanted = list(self.lab.plan.emotions["test_felt"])
        sounds, heard = self.lab.waves["felt"], self.lab.waves["test_felt"]
        learned = sounds.places[:BASELINE_SOUNDS]
        guesses = pitch_energy_baseline(
            [sounds[i] for i in learned],
            [self.lab.plan.emotions["felt"][i] for i in learned],
            [heard[i] for i in range(len(heard))],
        )
        del score["families"]
        right = exact(self.papers["ser"].wanted, trained.written["ser"])
        return {
            **score,
            "pitch_energy_baseline": float(np.mean([a == b for a, b in zip(wanted, guesses, strict=True)])),
            "families": _by_family([str(emotion) for emotion in wanted], right),
            "emotions": list(EMOTIONS),
        }

    def _captions(self, trained: Answers, untrained: Answers) -> dict[str, Any]:
        """caption: share of attributes (gender, pitch, pace, surroundings) that are named rightly; whole captions."""
        manners = self.lab.plan.manners["test_captioned"]
        frequent = most_frequent([caption(manner) for manner in self.lab.plan.manners["captioned"]])
        given = trained.written["caption"]
        marks = _attributes(manners, given)
        score = accuracy([right for mark in marks for right in mark.values()])
        return {
            "accuracy": score["accuracy"],
            "n": len(marks),
            "ci95": score["ci95"],
            "exact": self._share("caption", trained.written),
            "baseline": _mean(_attributes(manners, [frequent] * len(manners))),
            "other": _mean(_attributes(manners, others(given))),
            "untrained": _mean(_attributes(manners, untrained.written["caption"])),
            "attributes": {key: float(np.mean([mark[key] for mark in marks])) for key in marks[0]},
        }

    def codec(self, heard: Sequence[str], original: Sequence[str]) -> dict[str, Any]:
        """codec: word error rate of the recogniser after a round trip, beside the original sound's."""
        return {
            **word_error_rate(self.recited, heard),
            "wer_original": _wer(self.recited, original),
            "baseline": 1.0,
            "other": _wer(self.recited, others(heard)),
            "recogniser": RECOGNISER,
        }

    def synthesis(
        self, trained: Answers, untrained: Answers, original: Sequence[str], replies: Sequence[Reply]
    ) -> dict[str, Any]:
        """tts: word error rate of the recogniser on sentences the model read aloud."""
        seconds = sum(sound.seconds for sound in self.originals())
        return {
            **word_error_rate(self.recited, trained.heard_tts),
            "wer_original": _wer(self.recited, original),
            "baseline": 1.0,
            "other": _wer(self.recited, others(trained.heard_tts)),
            "untrained": _wer(self.recited[: len(untrained.heard_tts)], untrained.heard_tts),
            "length_ratio": sum(sound.seconds for sound in self.sounds(replies)) / seconds,
            "unfinished": sum(not reply.complete for reply in replies),
            "recogniser": RECOGNISER,
        }

    def spoken_answers(self, trained: Answers, untrained: Answers, best: Sequence[str]) -> dict[str, Any]:
        """s2s: spoken answers in which the recogniser hears the whole right sentence; `best`: what it hears when the
        right answers are spoken by the synthesiser itself."""
        wanted = [item.answer for item in self.spoken_items]
        right = exact(wanted, trained.heard_s2s)
        score = accuracy(right)
        return {
            "answer_accuracy": score["accuracy"],
            "n": score["n"],
            "ci95": score["ci95"],
            "text_accuracy": float(np.mean(exact(wanted, trained.own))),
            "accuracy_original": float(np.mean(exact(wanted, best))),
            "wer_own_text": _wer(trained.own, trained.heard_s2s),
            "baseline": float(np.mean(exact(wanted, [most_frequent(wanted)] * len(wanted)))),
            "other": float(np.mean(exact(wanted, others(trained.heard_s2s)))),
            "untrained": float(np.mean(exact(wanted[: len(untrained.heard_s2s)], untrained.heard_s2s))),
            "families": _by_family([item.family for item in self.spoken_items], right),
            "recogniser": RECOGNISER,
        }


def first_sound_seconds(responder: OmniResponder, questions: Sequence[Audio]) -> dict[str, Any]:
    """Median seconds from the question's end to the first sound of the answer, model loaded; and real-time factor."""
    waits, factors, early = [], [], 0
    for number, question in enumerate([questions[0], *questions]):  # the first is a warm-up
        begin, first, samples, text_done = time.perf_counter(), 0.0, 0, 0.0
        for delta in responder.respond((Turn("user", (question,)),)):
            if delta.pcm is not None:
                first = first or time.perf_counter() - begin
                samples += len(delta.pcm)
            if delta.text:
                text_done = time.perf_counter() - begin
        if number and samples:
            waits.append(first)
            early += first < text_done
            factors.append((time.perf_counter() - begin) / (samples / responder.rate_hz))
    if not waits:
        return {"seconds": None, "reason": "no answer had any sound", "n": 0}
    return {
        "seconds": float(np.median(waits)),
        "worst": max(waits),
        "n": len(waits),
        "before_text_ended": early / len(waits),
        "real_time_factor": float(np.median(factors)),
    }


def _texts(replies: Sequence[Reply]) -> list[str]:
    return [reply.text for reply in replies]


def _pcm(reply: Reply) -> np.ndarray:
    return reply.pcm if reply.pcm is not None else np.zeros(0, np.float32)


def _samples(sound: Audio) -> np.ndarray:
    assert sound.samples is not None
    return sound.samples


def _wer(references: Sequence[str], hypotheses: Sequence[str]) -> float | None:
    wer = word_error_rate(references, hypotheses)["wer"]
    assert wer is None or isinstance(wer, float)
    return wer


def _spaced(texts: Sequence[str]) -> list[str]:
    """Characters as words: their error rate is the character error rate."""
    return [" ".join(text.replace(" ", "")) for text in texts]


def _attributes(manners: Sequence[Manner], captions: Sequence[str]) -> list[dict[str, bool]]:
    return [caption_score(manner, said) for manner, said in zip(manners, captions, strict=False)]


def _mean(marks: Sequence[dict[str, bool]]) -> float:
    return float(np.mean([right for mark in marks for right in mark.values()]))


def _by_family(families: Sequence[str], right: Sequence[bool]) -> dict[str, dict[str, float]]:
    """Accuracy and n per family."""
    marked: dict[str, list[bool]] = {}
    for family, is_right in zip(families, right, strict=False):
        marked.setdefault(family, []).append(is_right)
    return {name: {"accuracy": float(np.mean(marks)), "n": len(marks)} for name, marks in sorted(marked.items())}
