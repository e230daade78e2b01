"""What each training stage of the demo sees and learns: one function per stage, from a step number to losses.

A step's rows follow from the seed, the stage's name and the step number alone, so a stage that is run again with the
same number of steps gives the same weights.
"""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from nexus.data.chat import SYSTEM, TASKS, ChatTokenizer, Rendered, render, task_turns
from nexus.data.collate import collate, sound
from nexus.data.stream import Buckets
from nexus.demo.corpus import Plan, Waves
from nexus.demo.phrases import CELLS, COLOURS, SHAPES
from nexus.demo.pictures import Scene, describe, picture_questions
from nexus.demo.pictures import render as draw
from nexus.demo.world import World
from nexus.model.omni import OmniModel
from nexus.pixels import patch_rows
from nexus.recipe import Recipe, StageConfig
from nexus.train.parallel import Ranks
from nexus.train.standins import CellNames, CharacterCTC
from nexus.types import Audio, Batch, Image, Script, Sight, SpeechBatch, Text, Turn

Losses = Callable[[int], dict[str, Tensor]]
DESCRIBE = "please describe the picture"
COPY = TASKS["asr"].instruction
CROP_SECONDS = 1.1
PREPARED_ROWS = 64
MASK_FROM_STEP = 150  # spectrum masking starts once the first words are heard


@dataclass
class Lab:
    """Everything the stages share: the recipe, the world, the waveforms, the model under training."""

    recipe: Recipe
    world: World
    plan: Plan
    waves: dict[str, Waves]
    tokenizer: ChatTokenizer
    model: OmniModel

    @functools.cached_property
    def scenes(self) -> list[Scene]:
        """Training scenes."""
        assert self.recipe.world is not None
        return self.world.scenes("train", self.recipe.world.pictures)

    @functools.cached_property
    def pictures(self) -> np.ndarray:
        """Their pictures, u8 [N, 84, 84, 3]."""
        return np.stack([draw(scene) for scene in self.scenes])

    @functools.cached_property
    def sentences(self) -> list[str]:
        """Training sentences to copy."""
        return self.world.sentences("train", 30_000, stream=1)

    @functools.cached_property
    def talks(self) -> list[tuple[str, str]]:
        """Typed training questions with their answers."""
        return self.world.plain_texts("train", 60_000, stream=1)

    def seed(self, stage: str) -> int:
        """A number for a stage, from the world's seed and its name."""
        return random.Random(f"{self.world.seed} {stage}").getrandbits(31)

    def rng(self, stage: str, step: int) -> random.Random:
        """The draw of one step."""
        return random.Random(f"{self.world.seed} {stage} {step}")

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Turns as tokens and labels."""
        return render(turns, self.tokenizer, self.recipe.model)

    def batch(self, rows: Sequence[Rendered]) -> Batch:
        """Rows side by side."""
        return collate(rows, self.tokenizer.pad, self.recipe.model)


def tokenizer_texts(world: World) -> Iterator[str]:
    """Texts from which the stand-in tokenizer learns its units: training sentences and the templates."""
    yield from world.all_sentences_for_lm(20_000)
    for _ in range(50):
        yield from (SYSTEM, DESCRIBE, COPY, "system", "user", "assistant")


def codec_losses(lab: Lab, config: StageConfig) -> Losses:
    """Stand-in codec: spectral distance on crops of the voice to be learned."""
    codec, waves = lab.model.codec, lab.waves["spoken"]
    assert codec is not None
    size = int(CROP_SECONDS * codec.config.rate_hz)
    long = [i for i, length in enumerate(waves.lengths) if length >= size]

    def losses(step: int) -> dict[str, Tensor]:
        rng = lab.rng("codec", step)
        crops = []
        for index in rng.choices(long, k=config.mixture["sound"]):
            wave = torch.from_numpy(_samples(waves[index]))
            start = rng.randrange(len(wave) - size + 1)
            crops.append(wave[start : start + size])
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        return {"loss": codec.vocoder_loss(torch.stack(crops), generator)}

    return losses


def sight_losses(lab: Lab, config: StageConfig) -> tuple[Losses, nn.Module]:
    """Stand-in vision tower, first part: what lies in each cell. Its heads stay here."""
    vision = lab.model.vision
    assert vision is not None
    heads = CellNames(lab.model.config.language.width, (len(SHAPES) + 1, len(COLOURS) + 1, len(CELLS)))
    labels = torch.tensor([_cells(scene) for scene in lab.scenes])  # [N, 9, 3]

    def losses(step: int) -> dict[str, Tensor]:
        chosen = lab.rng("sight", step).choices(range(len(lab.scenes)), k=config.mixture["picture"])
        seen = vision(_sight(lab, chosen)).embeds
        return {"loss": heads(seen, labels[chosen].flatten(0, 1))}

    return losses, heads


def backbone_losses(lab: Lab, config: StageConfig) -> Losses:
    """Stand-in backbone: typed questions, copying under the transcription instruction, talks about pictures."""

    def losses(step: int) -> dict[str, Tensor]:
        rng = lab.rng("backbone", step)
        rows = [_text_row(lab, rng) for _ in range(config.mixture["text"])]
        rows += [_picture_row(lab, rng) for _ in range(config.mixture["picture"])]
        text = lab.model(lab.batch(rows))["text"]
        return {"loss": text}

    return losses


def ears_losses(lab: Lab, config: StageConfig) -> tuple[Losses, CharacterCTC]:
    """Stand-in audio encoder: spelling by CTC. Its head stays here, and helps again in stage 1."""
    hearing = lab.model.hearing
    assert hearing is not None
    head = CharacterCTC(hearing.config.encoder.width)
    waves, said = lab.waves["heard"], lab.plan.sets["heard"]
    buckets = Buckets(waves.lengths.tolist(), config.mixture["asr"], lab.seed("ears"))

    def losses(step: int) -> dict[str, Tensor]:
        chosen = buckets.at(step)
        heard = sound([waves[i] for i in chosen], hearing.config)
        assert heard is not None
        if step >= MASK_FROM_STEP:
            _mask_spectrum(heard.mel, heard.lengths, lab.rng("mask", step))
        frames = torch.tensor([hearing.config.encoder.frames_for(int(n)) for n in heard.lengths])
        return {"loss": head(hearing.encode(heard), frames, [said[i].text for i in chosen])}

    return losses, head


def align_losses(lab: Lab, config: StageConfig, head: CharacterCTC) -> Losses:
    """Stage 1: recognition and spoken questions, language frozen; a little CTC keeps the encoder's spelling."""
    draw_rows = _audio_rows(lab, config, "align")
    weight = config.auxiliary.get("ctc", 0.0)

    def losses(step: int) -> dict[str, Tensor]:
        rows, heard = draw_rows(step)
        batch = lab.batch(rows)
        assert batch.sound is not None and lab.model.hearing is not None
        if step >= MASK_FROM_STEP:
            _mask_spectrum(batch.sound.mel, batch.sound.lengths, lab.rng("mask align", step))
        with _watched(lab.model.hearing.encoder) as states:
            text = lab.model(batch)["text"]
        frames = torch.tensor([lab.model.hearing.config.encoder.frames_for(int(n)) for n in batch.sound.lengths])
        ctc = head(states[0], frames, heard)
        return {"loss": text + weight * ctc, "text": text, "ctc": ctc}

    return losses


def sft_losses(lab: Lab, config: StageConfig) -> Losses:
    """Stage 2: spoken questions and recognition beside talks about pictures and typed text, encoders frozen."""
    draw_rows = _audio_rows(lab, config, "sft")

    def losses(step: int) -> dict[str, Tensor]:
        rng = lab.rng("sft", step)
        audio = lab.batch(draw_rows(step)[0])
        rest = [_picture_row(lab, rng) for _ in range(config.mixture["vqa"])]
        rest += [_text_row(lab, rng) for _ in range(config.mixture["text"])]
        heard, kept = lab.model(audio)["text"], lab.model(lab.batch(rest))["text"]
        share = len(audio.tokens) / (len(audio.tokens) + len(rest))
        return {"loss": share * heard + (1 - share) * kept, "heard": heard, "kept": kept}

    return losses


@dataclass(frozen=True)
class Line:
    """One thing the voice learns to say: states and embeddings [N, D], letters [N], codes [K, S]."""

    states: Tensor
    embeds: Tensor
    letters: Tensor
    codes: Tensor


def prepare_lines(lab: Lab, config: StageConfig, bf16: bool, ranks: Ranks, tell: Callable[[int], None]) -> list[Line]:
    """Frozen language states and codec codes of what this rank learns to say: sentences to read aloud, and answers to
    spoken questions in the mixture's proportion."""
    spoken = lab.plan.sets["spoken"]
    jobs: list[tuple[int | None, int]] = [(None, place) for place in range(len(spoken))]  # (question, what is said)
    replies = [(question, place) for question, place in enumerate(lab.plan.replies) if place >= 0]
    jobs += replies[: len(jobs) * config.mixture["s2s"] // config.mixture["tts"]]
    jobs = jobs[ranks.rank :: ranks.world]
    jobs.sort(key=lambda job: (job[0] is not None, len(spoken[job[1]].text)))  # rows of one length side by side
    lines: list[Line] = []
    for start in range(0, len(jobs), PREPARED_ROWS):
        some = jobs[start : start + PREPARED_ROWS]
        rows = [lab.render(_said(lab, question, place)) for question, place in some]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states = lab.model.spoken_states(lab.batch(rows), [row.spoken for row in rows])
        for (_, place), row, state in zip(some, rows, states, strict=True):
            lines.append(_line(lab, [row.tokens[at] for at in row.spoken], state.float(), place))
        tell(len(rows))
    return lines


def _said(lab: Lab, question: int | None, place: int) -> tuple[Turn, ...]:
    """The turns in which a sentence is spoken: read aloud, or as the answer to a spoken question."""
    text = lab.plan.sets["spoken"][place].text
    if question is None:
        return task_turns("tts", text=text)
    reply = Audio(samples=np.zeros(0, np.float32), rate_hz=16_000)  # marks the turn as spoken; its codes are known
    return task_turns("s2s", sound=lab.waves["heard"][question], text=text, speech=reply)


@torch.no_grad()
def _line(lab: Lab, tokens: Sequence[int], states: Tensor, place: int) -> Line:
    codec = lab.model.codec
    assert codec is not None
    codes = codec.encode(torch.from_numpy(_samples(lab.waves["spoken"][place]))[None, None])[0]
    letters = torch.tensor([lab.tokenizer.letters[token] for token in tokens])
    return Line(states, lab.model.language.embed(torch.tensor(tokens)), letters, codes)


def speak_losses(lab: Lab, config: StageConfig, lines: Sequence[Line]) -> Losses:
    """Stage 3: the voice alone, on prepared states and codes."""
    rows = config.mixture["tts"] + config.mixture["s2s"]
    buckets = Buckets([line.codes.shape[1] for line in lines], rows, lab.seed("speak"))

    def losses(step: int) -> dict[str, Tensor]:
        batch = _speech([lines[i] for i in buckets.at(step)])
        said = lab.model(replace(batch, previous=_mistaken(batch.codes, config, lab.rng("speak", step))))
        return {"loss": said["speech"], **said}

    return losses


def _speech(lines: Sequence[Line]) -> SpeechBatch:
    def pad(tensors: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True)

    script = Script(
        pad([line.states for line in lines]),
        pad([line.embeds for line in lines]),
        pad([line.letters for line in lines]),
        torch.tensor([len(line.letters) for line in lines]),
    )
    codes = pad([line.codes.T for line in lines]).transpose(1, 2)
    return SpeechBatch(script, codes, torch.tensor([line.codes.shape[1] for line in lines]))


def _mistaken(codes: Tensor, config: StageConfig, rng: random.Random) -> Tensor:
    """Codes with some replaced by others: in use the voice's past is its own, with mistakes in it."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    rows, _, frames = codes.shape
    wrong = torch.rand(codes.shape, generator=generator) < config.wrong_codes
    wrong |= torch.rand((rows, 1, frames), generator=generator) < config.wrong_frames
    others = torch.randint(0, int(codes.max()) + 1, codes.shape, generator=generator)
    return torch.where(wrong, others, codes)


def _audio_rows(lab: Lab, config: StageConfig, stage: str) -> Callable[[int], tuple[list[Rendered], list[str]]]:
    """Rows of recognition and of spoken questions for a step, and the words that are heard in each."""
    waves, said = lab.waves["heard"], lab.plan.sets["heard"]
    asked = len(lab.plan.questions)
    asr = Buckets(waves.lengths.tolist(), config.mixture["asr"], lab.seed(f"{stage} asr"))
    chat = Buckets(waves.lengths[:asked].tolist(), config.mixture["chat"], lab.seed(f"{stage} chat"))

    def rows(step: int) -> tuple[list[Rendered], list[str]]:
        heard, asked_now = asr.at(step), chat.at(step)
        turns = [task_turns("asr", sound=waves[i], text=said[i].text) for i in heard]
        turns += [task_turns("chat", sound=waves[i], text=lab.plan.questions[i].answer) for i in asked_now]
        return [lab.render(t) for t in turns], [said[i].text for i in (*heard, *asked_now)]

    return rows


def _text_row(lab: Lab, rng: random.Random, turns: int = 3) -> Rendered:
    """A typed conversation: each turn a question, or words to copy under the transcription instruction."""
    talk: list[Turn] = []
    for _ in range(turns):
        if rng.random() < 0.4:
            text = rng.choice(lab.sentences)
            talk += [Turn("user", (Text(text), Text(COPY))), Turn("assistant", (Text(text),))]
        else:
            question, answer = rng.choice(lab.talks)
            talk += [Turn("user", (Text(question),)), Turn("assistant", (Text(answer),))]
    return lab.render(talk)


def _picture_row(lab: Lab, rng: random.Random, turns: int = 4) -> Rendered:
    """A talk about one picture: some of its questions, sometimes its description, in any order."""
    index = rng.randrange(len(lab.scenes))
    scene = lab.scenes[index]
    asks = [(item.question, item.answer) for item in picture_questions(scene, rng)]
    asks.append((DESCRIBE, describe(scene)))
    talk: list[Turn] = []
    for number, (question, answer) in enumerate(rng.sample(asks, turns)):
        words = Text(question)
        picture = Image(pixels=lab.pictures[index])
        talk += [Turn("user", (picture, words) if number == 0 else (words,)), Turn("assistant", (Text(answer),))]
    return lab.render(talk)


def _cells(scene: Scene) -> list[tuple[int, int, int]]:
    """(shape, colour, which cell) of each of the nine cells; shape and colour are 0 where it is empty."""
    cells = [(0, 0, place) for place in range(len(CELLS))]
    for thing in scene.things:
        cells[thing.cell] = (SHAPES.index(thing.shape) + 1, COLOURS.index(thing.colour) + 1, thing.cell)
    return cells


def _sight(lab: Lab, chosen: Sequence[int]) -> Sight:
    """Patch rows of equally large pictures, made in one go."""
    config = lab.recipe.model.vision
    assert config is not None
    rows = patch_rows(lab.pictures[list(chosen)][:, None], config)
    high, wide = lab.pictures.shape[1:3]
    return Sight(rows.flatten(0, 1), torch.tensor([config.grid_for(1, high, wide)] * len(chosen)))


def _mask_spectrum(mel: Tensor, lengths: Tensor, rng: random.Random) -> None:
    """SpecAugment (Park et al. 2019) in place: one band of mels and one stretch of at most 0.2 s per item."""
    for row, length in enumerate(lengths.tolist()):
        band, low = rng.randint(0, 12), rng.randrange(mel.shape[1])
        stretch, start = rng.randint(0, 20), rng.randrange(max(1, length))
        mel[row, low : low + band] = 0.0
        mel[row, :, start : start + stretch] = 0.0


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """Outputs of a module while the block runs: what an auxiliary loss needs beside the model's own."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def _samples(sound_: Audio) -> np.ndarray:
    assert sound_.samples is not None
    return sound_.samples
