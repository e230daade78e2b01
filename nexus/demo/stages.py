"""What each training stage of the demo sees and learns: one function per stage, from a step number to losses.

A step's rows follow from the seed, the stage's name and the step number alone, so a stage that is run again with the
same number of steps gives the same weights.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from nexus.codec.rvq import RVQCodec
from nexus.data.chat import Rendered, task_turns
from nexus.data.collate import sound
from nexus.data.prepared import Line, mistaken, speech_batch
from nexus.data.stream import Buckets
from nexus.demo.lab import Lab
from nexus.demo.manner import EMOTIONS, GENDERS, PACES, PITCHES
from nexus.demo.phrases import CELLS, COLOURS, SHAPES
from nexus.demo.pictures import Scene
from nexus.demo.rows import EARS, MANNERED, SILENT, heard_rows
from nexus.pixels import patch_rows
from nexus.recipe import StageConfig
from nexus.train.parallel import Ranks
from nexus.train.standins import CellNames, CharacterCTC, MannerNames, WordCTC
from nexus.types import Audio, Sight, Turn

Losses = Callable[[int], dict[str, Tensor]]
CROP_SECONDS = 1.1
PREPARED_ROWS = 64
EMPTY = "nothing"  # what is in a cell without a shape
MASK_FROM_STEP = 150  # spectrum masking starts once the first words are heard
MANNER_VALUES: tuple[tuple[str | bool, ...], ...] = (EMOTIONS, GENDERS, PITCHES, PACES, (False, True))  # noisy


def codec_losses(lab: Lab, config: StageConfig) -> Losses:
    """Stand-in codec: spectral distance on crops of the voice to be learned."""
    codec, waves = lab.model.codec, lab.waves["spoken"]
    assert isinstance(codec, RVQCodec)
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
    heads = CellNames([_embedded(lab, names) for names in ((EMPTY, *SHAPES), (EMPTY, *COLOURS), CELLS)])
    labels = torch.tensor([_cells(scene) for scene in lab.scenes])  # [N, 9, 3]

    def losses(step: int) -> dict[str, Tensor]:
        chosen = lab.rng("sight", step).choices(range(len(lab.scenes)), k=config.mixture["picture"])
        seen = vision(_sight(lab, chosen)).embeds
        return {"loss": heads(seen, labels[chosen].flatten(0, 1))}

    return losses, heads


def backbone_losses(lab: Lab, config: StageConfig) -> Losses:
    """Stand-in backbone: typed conversations, talks about pictures and about films."""

    def losses(step: int) -> dict[str, Tensor]:
        return {"loss": lab.model(lab.batch(_silent_rows(lab, config, lab.rng("backbone", step))))["text"]}

    return losses


def _silent_rows(lab: Lab, config: StageConfig, rng: random.Random) -> list[Rendered]:
    """The rows of a step that hold no sound."""
    return [draw(lab, rng) for kind, draw in SILENT.items() for _ in range(config.mixture.get(kind, 0))]


class Ears(nn.Module):
    """The heads of the stand-in audio encoder: how it is spelled, and who speaks how."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spelling = CharacterCTC(width)
        self.manner = MannerNames(width, [len(values) for values in MANNER_VALUES])


def ears_losses(lab: Lab, config: StageConfig) -> tuple[Losses, Ears]:
    """Stand-in audio encoder: spelling by CTC, Mandarin in pinyin, and for `auxiliary.manner` of its loss who speaks
    how. Its heads stay here; the spelling helps again in stage 1."""
    hearing = lab.model.hearing
    assert hearing is not None
    heads, weight = Ears(hearing.config.encoder.width), config.auxiliary.get("manner", 0.0)
    sets = [name for name in (*EARS, *(MANNERED if weight else ())) if name in lab.plan.sets]
    places = [(name, i) for name in sets for i in lab.waves[name].places]
    lengths = [int(lab.waves[name].lengths[i]) for name, i in places]
    buckets = Buckets(lengths, config.mixture["asr"], lab.seed("ears"))

    def losses(step: int) -> dict[str, Tensor]:
        chosen = [places[index] for index in buckets.at(step)]
        heard = sound([lab.waves[name][i] for name, i in chosen], hearing.config)
        assert heard is not None
        if step >= MASK_FROM_STEP:
            _mask_spectrum(heard.mel, heard.lengths, lab.rng("mask", step))
        frames = torch.tensor([hearing.config.encoder.frames_for(int(n)) for n in heard.lengths])
        states = hearing.encode(heard)
        ctc = heads.spelling(states, frames, [lab.spelling[name][i] for name, i in chosen])
        if not weight:
            return {"loss": ctc}
        manner = heads.manner(states, frames, torch.tensor([_manner_labels(lab, name, i) for name, i in chosen]))
        return {"loss": ctc + weight * manner, "ctc": ctc, "manner": manner}

    return losses, heads


def _manner_labels(lab: Lab, name: str, place: int) -> tuple[int, ...]:
    """Which of `MANNER_VALUES` are true of an utterance; -1 where nothing was planned."""
    if name == "felt":
        return (EMOTIONS.index(lab.plan.emotions[name][place]), -1, -1, -1, -1)
    if name == "captioned":
        manner = lab.plan.manners[name][place]
        said = (manner.gender, manner.pitch, manner.pace, manner.noisy)
        return (-1, *(values.index(value) for values, value in zip(MANNER_VALUES[1:], said, strict=True)))
    return (-1,) * len(MANNER_VALUES)


class Readers(nn.Module):
    """The heads of stage 1, which say what was heard: by its letters, from the encoder's states, and by its words, from
    the adapter's embeddings. The first is the ears' own."""

    def __init__(self, lab: Lab, spelling: CharacterCTC) -> None:
        super().__init__()
        torch.manual_seed(lab.seed("align head"))
        self.spelling, self.words = spelling, WordCTC(lab.model.language.embed(torch.arange(lab.tokenizer.size)))


def align_losses(lab: Lab, config: StageConfig, spelling: CharacterCTC) -> tuple[Losses, Readers]:
    """Stage 1: all that is heard, language frozen. A little CTC keeps the encoder's spelling, and shows the adapter
    where the language model has the words."""
    heard_at, heads = heard_rows(lab, config.mixture, "align"), Readers(lab, spelling)
    hearing = lab.model.hearing
    assert hearing is not None

    def losses(step: int) -> dict[str, Tensor]:
        heard = heard_at(step)
        batch = lab.batch([lab.render(row.turns) for row in heard])
        assert batch.sound is not None
        if step >= MASK_FROM_STEP:
            _mask_spectrum(batch.sound.mel, batch.sound.lengths, lab.rng("mask align", step))
        with _watched(hearing.encoder) as states, _watched(hearing.adapter) as embeds:
            text = lab.model(batch)["text"]
        frames = [hearing.config.encoder.frames_for(int(n)) for n in batch.sound.lengths]
        ctc = heads.spelling(states[0], torch.tensor(frames), [row.spelled for row in heard])
        told = {"loss": text + config.auxiliary.get("ctc", 0.0) * ctc, "text": text, "ctc": ctc}
        if weight := config.auxiliary.get("words"):
            lengths = [-(-n // hearing.config.adapter.stack) for n in frames]
            told["words"] = heads.words(embeds[0], lengths, [lab.tokenizer.encode(row.words) for row in heard])
            told["loss"] = told["loss"] + weight * told["words"]
        return told

    return losses, heads


def sft_losses(lab: Lab, config: StageConfig) -> Losses:
    """Stage 2: all that is heard beside talks about pictures and films and typed text, encoders frozen."""
    heard_at = heard_rows(lab, config.mixture, "sft")

    def losses(step: int) -> dict[str, Tensor]:
        audio = lab.batch([lab.render(row.turns) for row in heard_at(step)])
        rest = lab.batch(_silent_rows(lab, config, lab.rng("sft", step)))
        heard, kept = lab.model(audio)["text"], lab.model(rest)["text"]
        share = len(audio.tokens) / (len(audio.tokens) + len(rest.tokens))
        return {"loss": share * heard + (1 - share) * kept, "heard": heard, "kept": kept}

    return losses


def prepare_lines(lab: Lab, config: StageConfig, bf16: bool, ranks: Ranks, tell: Callable[[int], None]) -> list[Line]:
    """Frozen language states and codec codes of what this rank learns to say: sentences to read aloud, and answers to
    spoken questions in the mixture's proportion."""
    spoken = lab.plan.sets["spoken"]
    said, asked = set(lab.waves["spoken"].places), set(lab.waves["heard"].places)
    jobs: list[tuple[int | None, int]] = [(None, place) for place in sorted(said)]  # (question, what is said)
    replies = [(ask, place) for ask, place in enumerate(lab.plan.replies) if ask in asked and place in said]
    jobs += replies[: len(jobs) * config.mixture["s2s"] // config.mixture["tts"]]
    jobs = jobs[ranks.rank :: ranks.world]
    jobs.sort(key=lambda job: (job[0] is not None, len(spoken[job[1]].text)))  # rows of one length side by side
    lab.model.pack(True)
    lines: list[Line] = []
    for start in range(0, len(jobs), PREPARED_ROWS):
        some = jobs[start : start + PREPARED_ROWS]
        rows = [lab.render(_said(lab, question, place)) for question, place in some]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states = lab.model.spoken_states(lab.batch(rows), [row.spoken for row in rows])
        for (_, place), row, state in zip(some, rows, states, strict=True):
            lines.append(_line(lab, [row.tokens[at] for at in row.spoken], state.float(), place))
        tell(len(rows))
    lab.model.pack(False)
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
    letters = torch.from_numpy(lab.tokenizer.letters[list(tokens)])
    embeds = lab.model.language.embed(torch.tensor(tokens))
    return Line(states.half(), embeds.half(), letters.short(), codes.short())  # tens of thousands stay in memory


def speak_losses(lab: Lab, config: StageConfig, lines: Sequence[Line]) -> Losses:
    """Stage 3: the voice alone, on prepared states and codes."""
    rows = config.mixture["tts"] + config.mixture["s2s"]
    buckets = Buckets([line.codes.shape[1] for line in lines], rows, lab.seed("speak"))

    def losses(step: int) -> dict[str, Tensor]:
        batch = speech_batch([lines[i] for i in buckets.at(step)])
        generator = torch.Generator().manual_seed(lab.rng("speak", step).getrandbits(40))
        shown = mistaken(batch.codes, config.wrong_codes, config.wrong_frames, generator)
        said = lab.model(replace(batch, previous=shown))
        return {"loss": said["speech"], **said}

    return losses


def _cells(scene: Scene) -> list[tuple[int, int, int]]:
    """(shape, colour, which cell) of each of the nine cells; shape and colour are 0 where it is empty."""
    cells = [(0, 0, place) for place in range(len(CELLS))]
    for thing in scene.things:
        cells[thing.cell] = (SHAPES.index(thing.shape) + 1, COLOURS.index(thing.colour) + 1, thing.cell)
    return cells


def _embedded(lab: Lab, names: Sequence[str]) -> Tensor:
    """The language model's embeddings [C, D] of names; of several tokens their mean."""
    tokens = [torch.tensor(lab.tokenizer.encode(name)) for name in names]
    return torch.stack([lab.model.language.embed(name).mean(0) for name in tokens])


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
