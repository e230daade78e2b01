"""The demo's examination: held-out sentences, voices, questions and pictures; every score beside its baselines.

Speech is judged by a recogniser that had no part in training (PocketSphinx with a bigram of the world's training
sentences); its error on the original recordings stands beside every such score.
"""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nexus.data.chat import task_turns
from nexus.demo.phrases import Item
from nexus.demo.pictures import picture_questions
from nexus.demo.pictures import render as draw
from nexus.demo.stages import Lab
from nexus.demo.world import majority_answer
from nexus.engines.transcribe import transcribe_many
from nexus.eval.scores import accuracy, exact, others, paired_drop, word_error_rate
from nexus.respond import OmniResponder, Reply
from nexus.types import Audio, Image, Text, Turn

MAX_SECONDS = 12.0  # of one spoken reply
MAX_TOKENS = 32  # the longest sentence of the world has 18 words
LM_SENTENCES = 40_000
RECOGNISER = "pocketsphinx, bigram of the world's training sentences"


@dataclass
class Answers:
    """Everything one model said in the examination, as texts: written by itself, or heard by the recogniser."""

    asr: list[str]
    sqa: list[str]
    typed: list[str]
    seen: list[str]
    own: list[str]  # texts of the spoken answers
    heard_tts: list[str]
    heard_s2s: list[str]


@dataclass
class Exam:
    """The test items."""

    lab: Lab
    processes: int
    pictures: list[np.ndarray] = field(default_factory=list)
    picture_items: list[Item] = field(default_factory=list)

    def __post_init__(self) -> None:
        world, config = self.lab.world, self.lab.recipe.world
        assert config is not None
        rng = random.Random(f"{world.seed} exam")
        for scene in world.scenes("test", config.test_pictures):
            asks = picture_questions(scene, rng)
            self.pictures.append(draw(scene))
            self.picture_items.append(asks[len(self.picture_items) % len(asks)])  # families in turn

    @property
    def recited(self) -> list[str]:
        """The held-out sentences of speech synthesis."""
        return [utterance.text for utterance in self.lab.plan.sets["test_spoken"]]

    @property
    def dictated(self) -> list[str]:
        """The held-out sentences of recognition."""
        return [utterance.text for utterance in self.lab.plan.sets["test_heard"]]

    @property
    def items(self) -> list[Item]:
        """The held-out spoken questions."""
        return self.lab.plan.test_questions

    @property
    def spoken_items(self) -> list[Item]:
        """Those whose answers are spoken as well: as many as there are recited sentences."""
        return self.items[: len(self.recited)]

    def look(self, responder: OmniResponder, pictures: Sequence[np.ndarray], max_tokens: int = MAX_TOKENS) -> list[str]:
        """Answers to the picture questions, each asked about the picture of the same place."""
        asks = [
            (Turn("user", (Image(pixels=picture), Text(item.question))),)
            for picture, item in zip(pictures, self.picture_items, strict=True)
        ]
        return _texts(responder.answer_many(asks, max_tokens=max_tokens))

    def talk(
        self, responder: OmniResponder, max_tokens: int = MAX_TOKENS, max_seconds: float = MAX_SECONDS
    ) -> tuple[list[Reply], list[Reply]]:
        """Sentences read aloud, and spoken answers to spoken questions."""
        aloud = [task_turns("tts", text=text)[:1] for text in self.recited]
        asked = [
            task_turns("s2s", sound=self.lab.waves["test_questions"][i])[:1] for i in range(len(self.spoken_items))
        ]
        recited = responder.answer_many(aloud, True, max_tokens, max_seconds)
        return recited, responder.answer_many(asked, True, max_tokens, max_seconds)

    def answer(
        self,
        responder: OmniResponder,
        spoken: tuple[list[Reply], list[Reply]],
        heard: tuple[list[str], list[str]],
        max_tokens: int = MAX_TOKENS,
    ) -> Answers:
        """All text answers of a model, with what was heard of its speech."""
        waves = self.lab.waves
        dictation = [task_turns("asr", sound=waves["test_heard"][i])[:1] for i in range(len(self.dictated))]
        asked = [task_turns("chat", sound=waves["test_questions"][i])[:1] for i in range(len(self.items))]
        typed = [(Turn("user", (Text(item.question),)),) for item in self.items]
        asr, sqa, ceiling = (
            _texts(responder.answer_many(conversations, max_tokens=max_tokens))
            for conversations in (dictation, asked, typed)
        )
        return Answers(asr, sqa, ceiling, self.look(responder, self.pictures, max_tokens), _texts(spoken[1]), *heard)

    @torch.no_grad()
    def codec_round_trip(self) -> list[Audio]:
        """The original recordings of the recited sentences through encoder and decoder."""
        codec = self.lab.model.codec
        assert codec is not None
        sounds = []
        for wave in self.originals():
            decoded = codec.decode(codec.encode(torch.from_numpy(_samples(wave))[None, None]))[0, 0]
            sounds.append(Audio(samples=decoded.numpy(), rate_hz=codec.config.rate_hz))
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

    def recognition(self, trained: Answers, untrained: Answers) -> dict[str, Any]:
        """asr: word error rate of the model's transcripts."""
        frequent = Counter(self.lab.sentences).most_common(1)[0][0]
        return {
            **word_error_rate(self.dictated, trained.asr),
            "baseline": _wer(self.dictated, [frequent] * len(self.dictated)),
            "other_audio": _wer(self.dictated, others(trained.asr)),
            "untrained": _wer(self.dictated, untrained.asr),
            "normaliser": "none (the world's spelling)",
        }

    def spoken_questions(self, trained: Answers, untrained: Answers) -> dict[str, Any]:
        """sqa: whole answers to spoken questions, letter by letter."""
        wanted = [item.answer for item in self.items]
        right = exact(wanted, trained.sqa)
        return {
            **accuracy(right),
            "text_ceiling": _share(wanted, trained.typed),
            "baseline": _share(wanted, [majority_answer(self.items)] * len(wanted)),
            "other_audio": _share(wanted, others(trained.sqa)),
            "untrained": _share(wanted, untrained.sqa),
            "families": _by_family(self.items, right),
        }

    def picture_questions(
        self, trained: Answers, untrained: Answers, before: Sequence[str], shuffled: Sequence[str]
    ) -> dict[str, Any]:
        """vqa: whole answers about pictures; `before` the audio stages, `shuffled` with another item's picture."""
        wanted = [item.answer for item in self.picture_items]
        right = exact(wanted, trained.seen)
        score, drop = accuracy(right), paired_drop(exact(wanted, before), right)
        return {
            "accuracy_before_audio": _share(wanted, before),
            "accuracy_after": score["accuracy"],
            "n": score["n"],
            "ci95": score["ci95"],
            "drop": drop["drop"],
            "drop_ci95": drop["ci95"],
            "baseline": _share(wanted, [majority_answer(self.picture_items)] * len(wanted)),
            "other_picture": _share(wanted, shuffled),
            "untrained": _share(wanted, untrained.seen),
            "families": _by_family(self.picture_items, right),
        }

    def codec(self, heard: Sequence[str], original: Sequence[str]) -> dict[str, Any]:
        """codec: word error rate of the recogniser after a round trip, beside the original sound's."""
        return {
            **word_error_rate(self.recited, heard),
            "wer_original": _wer(self.recited, original),
            "baseline": 1.0,
            "other_audio": _wer(self.recited, others(heard)),
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
            "other_audio": _wer(self.recited, others(trained.heard_tts)),
            "untrained": _wer(self.recited, untrained.heard_tts),
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
            "text_accuracy": _share(wanted, trained.own),
            "accuracy_original": _share(wanted, best),
            "wer_own_text": _wer(trained.own, trained.heard_s2s),
            "baseline": _share(wanted, [majority_answer(self.spoken_items)] * len(wanted)),
            "other_audio": _share(wanted, others(trained.heard_s2s)),
            "untrained": _share(wanted, untrained.heard_s2s),
            "families": _by_family(self.spoken_items, right),
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


def _share(wanted: Sequence[str], given: Sequence[str]) -> float:
    return float(np.mean(exact(wanted, given)))


def _by_family(items: Sequence[Item], right: Sequence[bool]) -> dict[str, dict[str, float]]:
    """Accuracy and n per family."""
    families: dict[str, list[bool]] = {}
    for item, is_right in zip(items, right, strict=True):
        families.setdefault(item.family, []).append(is_right)
    return {name: {"accuracy": float(np.mean(marks)), "n": len(marks)} for name, marks in sorted(families.items())}
