"""Training steps of the three stages on rows of the demo, against a plain `Trainer` of transformers on the same model,
data, type of numbers and threads, each at its own best batch size; the loader alone; two ranks against one.

The rows are those of the demo's world in the proportions of its stages, made once and held in memory on both sides.
Ours come in length-aware batches (`data.mixture`, `data.prepared`) whose rows are laid end to end (`model.packing`),
theirs shuffled and padded to the longest. Both sides learn by AdamW with the same model code, so what differs is the
batches, what is computed of their padding, and the loop.
"""

import functools
import importlib.util
import io
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from nexus.bench.race import Say, Settings, describe, ratio, side, threads, verdict
from nexus.data.chat import ChatTokenizer, Rendered
from nexus.data.mixture import Mixture
from nexus.data.prepared import Line, SpeechBatches, speech_batch
from nexus.data.stream import Budget, Lengths
from nexus.demo.corpus import plan
from nexus.demo.lab import Lab
from nexus.demo.mandarin import pairs
from nexus.demo.rows import SILENT, film_words, heard_rows, tokenizer_texts
from nexus.demo.spoken import speak
from nexus.demo.world import World
from nexus.errors import BadConfig
from nexus.model.folder import save_model
from nexus.model.omni import OmniModel
from nexus.processes import cores, in_processes
from nexus.progress import Progress
from nexus.recipe import OptimConfig, Recipe
from nexus.train.loop import Pace, fit
from nexus.train.parallel import Ranks
from nexus.train.prepare import open_prepared, prepare
from nexus.train.stage import freeze
from nexus.types import Audio, Batch, Sample, SpeechBatch, Text, Turn

OPTIM = OptimConfig(rate=1e-5, warmup_steps=1)  # what is learned does not matter, but that the numbers stay numbers
# The demo's world a tenth as large: everything its stages learn from, nothing to examine.
WORLD = (
    "world={heard: 1200, spoken: 700, mandarin: 300, english: 150, captioned: 400, felt: 200, looked: 300,"
    " followed: 350, pictures: 600, films: 400, test_heard: 20, test_questions: 20, test_spoken: 20, test_mandarin: 8,"
    " test_english: 8, test_captioned: 8, test_felt: 10, test_looked: 6, test_followed: 8, test_pictures: 12,"
    " test_films: 10}"
)


@dataclass(frozen=True)
class Heat:
    """What is raced: the world's size, rows of a turn, batch sizes that either side may choose from, and the bars."""

    overrides: tuple[str, ...] = (WORLD,)
    sentences: int = 5_000
    rows: int = 160
    batch_rows: tuple[int, ...] = (8, 16, 32, 64)  # theirs
    tokens: tuple[int, ...] = (1024, 2048, 4096)  # ours: language positions of a batch
    speech_seconds: tuple[float, ...] = (20.0, 40.0, 80.0)  # ours: seconds of speech of a batch
    sound_seconds_per_token: float = 0.1  # ours: seconds of sound that a batch may hold beside its positions
    repeats: int = 3
    rank_steps: int = 20
    rank_turns: int = 2
    bar: float = 2.0
    loader_bar: float = 5.0
    ranks_bar: float = 1.6


FULL = Heat()
# Organs as narrow as can be: what is raced is only that everything runs.
TINY = Heat(
    overrides=(
        "world={heard: 40, spoken: 20, pictures: 20, test_heard: 20, test_questions: 20, test_spoken: 20,"
        " test_pictures: 12}",
        "stages.align.mixture={asr: 4, chat: 2}",
        "stages.sft.mixture={asr: 4, chat: 2, picture: 2, text: 2}",
        "model.language={vocab_size: 400, width: 32, layers: 1, heads: 2, kv_heads: 1, ffn_width: 32,"
        " mrope_section: [2, 3, 3], rope_theta: 10000.0, max_positions: 2048}",
        "model.vision={width: 32, layers: 1, heads: 2, ffn_width: 32, window: 56, full_attention_layers: [0],"
        " min_pixels: 7056, max_pixels: 50176, max_frames: 32}",
        "model.hearing={encoder: {num_mels: 80, width: 32, layers: 1, heads: 2, ffn_width: 32, conv_strides: [2, 2],"
        " positions: rope, window_seconds: 30.0}, adapter: {stack: 5, width: 32}, max_seconds: 120.0}",
        "model.voice={width: 32, layers: 1, heads: 2, ffn_width: 32, books: 8, book_size: 16, max_seconds: 30.0}",
        "model.codec={num_fft: 1024, hop: 256, num_mels: 80, stack: 3, books: 8, book_size: 16, pca_dims: 8,"
        " vocoder_width: 16, vocoder_blocks: 1}",
    ),
    sentences=300,
    rows=24,
    batch_rows=(4, 8),
    tokens=(1024,),
    speech_seconds=(40.0,),
    repeats=2,
    rank_steps=2,
    rank_turns=1,
    bar=0.0,
    loader_bar=0.0,
    ranks_bar=0.0,
)


def bench(heat: Heat, say: Say) -> dict[str, Any]:
    """All cases; the result as JSON. Raises BadConfig where `accelerate`, which the Trainer needs, is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise BadConfig("the benchmark training races transformers' Trainer, which needs accelerate; pip install it")
    with threads(1), tempfile.TemporaryDirectory() as folder:
        say("training: speaking a small world")
        lab = _lab(heat, Path(folder))
        stages = {name: _conversations(heat, lab, name) for name in ("align", "sft")}
        stages["speak"] = _speech(heat, lab, Path(folder))
        cases = [_against_trainer(heat, name, stage, Path(folder), say) for name, stage in stages.items()]
        cases += [_loader(heat, name, stage, say) for name, stage in stages.items()]
        cases.append(_ranks(heat, Path(folder), say))
    settings = {"recipe": lab.recipe.name, "dtype": "float32", "threads": 1, "rows": heat.rows}
    return {"settings": settings, "cases": cases, "passed": all(case["passed"] for case in cases)}


@dataclass(frozen=True)
class Stage:
    """A stage to race: its model, what trains, the rows of the pool, how some of them become a batch, how long each is,
    and our batches by a setting of their own."""

    model: OmniModel
    trainable: tuple[str, ...]
    rows: Sequence[Any]
    join: Callable[[Sequence[Any]], Batch | SpeechBatch]
    loss: str
    ours: Mapping[str, "Ours"] = field(default_factory=dict)


@dataclass(frozen=True)
class Ours:
    """Our batches of an epoch at one setting, and the rows in them."""

    settings: Settings
    steps: int
    rows: int
    at: Callable[[int], Batch | SpeechBatch]


def _lab(heat: Heat, folder: Path) -> Lab:
    """The demo's lab on a small world; waveforms found in `folder` are not spoken again."""
    recipe = Recipe.load("nexus-tiny", heat.overrides)
    assert recipe.world is not None
    world = World(recipe.world.seed)
    plans = plan(world, recipe.world)
    sets = {name: members for name, members in plans.sets.items() if not name.startswith("test_")}
    waves = speak(folder / "corpus", sets, 0.0, 1, Progress(io.StringIO()))
    chinese = [pair.zh for pair in pairs("train", heat.sentences, world.seed)]
    texts = tokenizer_texts([*world.all_sentences_for_lm(heat.sentences), *film_words()], chinese)
    tokenizer = ChatTokenizer.train(recipe.tokenizer, texts, recipe.model.language.vocab_size)
    torch.manual_seed(0)
    return Lab(recipe, world, plans, waves, tokenizer, OmniModel(recipe.model).eval())


def _pool(heat: Heat, lab: Lab, name: str) -> list[Rendered]:
    """Rows in the stage's proportions, in no order."""
    mixture, rng = lab.recipe.stage(name).mixture, random.Random(name)
    heard, rows, step = heard_rows(lab, mixture, name), list[Rendered](), 0
    while len(rows) < heat.rows:
        rows += [lab.render(row.turns) for row in heard(step)]
        rows += [draw(lab, rng) for task, draw in SILENT.items() for _ in range(mixture.get(task, 0))]
        step += 1
    return rng.sample(rows, heat.rows)


class _Pool:
    """Rendered rows as a source of the mixture: a Sample stands for the row whose number is its id."""

    name, weight, fingerprint = "pool", 1.0, "0" * 16

    def __init__(self, lab: Lab, rows: Sequence[Rendered]) -> None:
        self._count, hearing = len(rows), lab.recipe.model.hearing
        assert hearing is not None
        sounds = [[part for part in row.media if isinstance(part, Audio)] for row in rows]
        windows = [[n / 16_000 for one in some for n in hearing.windows_for(_samples(one))] for some in sounds]
        self.lengths = Lengths(
            np.array([len(row.tokens) for row in rows]),
            np.array([sum(some) for some in windows]),
            np.array([len(some) for some in windows]),
            np.array([max(some, default=0.0) for some in windows]),
        )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        return Sample(str(index), "", ())


def _samples(sound: Audio) -> int:
    assert sound.samples is not None
    return len(sound.samples)


def _conversations(heat: Heat, lab: Lab, name: str) -> Stage:
    rows = _pool(heat, lab, name)
    source, ours = _Pool(lab, rows), {}
    for tokens in heat.tokens:
        mixture = Mixture([source], Budget(tokens, tokens * heat.sound_seconds_per_token), 0)
        steps = mixture.batches_per_epoch
        seen = sum(len(mixture.at(step)) for step in range(steps))
        ours[str(tokens)] = Ours({"tokens": tokens}, steps, seen, functools.partial(_mixed, lab, rows, mixture))
    return Stage(lab.model, lab.recipe.stage(name).trainable, rows, lab.batch, "text", ours)


def _mixed(lab: Lab, rows: Sequence[Rendered], mixture: Mixture, step: int) -> Batch:
    return lab.batch([rows[int(sample.id)] for sample in mixture.at(step)])


@dataclass(frozen=True)
class _Spoken:
    """What the voice learns to say, as rows for `prepare`."""

    lab: Lab
    places: Sequence[int]
    fingerprint: str = "0" * 16

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> Sample:
        text = self.lab.plan.sets["spoken"][self.places[row]].text
        words = Turn("user", (Text(text, aloud=True),))
        return Sample(str(row), "tts", (words, Turn("assistant", (self.lab.waves["spoken"][self.places[row]],))))

    def where(self, row: int) -> str:
        return f"row {row}"


def _speech(heat: Heat, lab: Lab, folder: Path) -> Stage:
    """Stage 3 on prepared states and codes: sentences read aloud."""
    model = folder / "model"
    save_model(model, lab.model, {})
    lab.tokenizer.save(model / "tokenizer.json")
    count = len(lab.plan.sets["spoken"])
    prepare(model, _Spoken(lab, [n % count for n in range(heat.rows)]), folder / "prepared", dtype="float32")
    lines = open_prepared(folder / "prepared", model)
    held = [lines[number] for number in range(len(lines))]
    ours = {}
    for seconds in heat.speech_seconds:
        batches = SpeechBatches(lines, seconds, 0)
        at = functools.partial(_said, held, batches)
        ours[f"{seconds:g}"] = Ours({"seconds": seconds}, batches.batches_per_epoch, len(lines), at)
    return Stage(lab.model, lab.recipe.stage("speak").trainable, held, speech_batch, "speech", ours)


def _said(held: Sequence[Line], batches: SpeechBatches, step: int) -> SpeechBatch:
    return speech_batch([held[number] for number in batches.chosen(step)])


class _Unseen:
    """A watch that shows nothing."""

    total: int | None = None

    def advance(self, n: int = 1, **values: float) -> None:
        pass


def _learn(stage: Stage, at: Callable[[int], Batch | SpeechBatch], steps: int, ranks: Ranks | None = None) -> float:
    """Seconds of that many steps of our loop."""

    def losses(step: int) -> dict[str, Tensor]:
        return {"loss": stage.model(at(step))[stage.loss]}

    parameters = freeze(stage.model.train(), stage.trainable)
    stage.model.pack(True)
    begin = time.perf_counter()
    fit(parameters, OPTIM, losses, Pace(0.0, 1, steps=steps), _Unseen(), bf16=False, ranks=ranks or Ranks())
    return time.perf_counter() - begin


class _Wrapped(nn.Module):
    """The model as the Trainer calls it."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.model, self._loss = stage.model, stage.loss

    def forward(self, rows: Batch | SpeechBatch) -> dict[str, Tensor]:
        return {"loss": self.model(rows)[self._loss]}


class _Clock(TrainerCallback):
    """Times the Trainer's loop alone, not what it sets up before."""

    seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._begin = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self._begin


def _trainer_seconds(stage: Stage, rows: int, folder: Path) -> float:
    """Seconds of an epoch of the pool in the Trainer, `rows` at a time."""
    freeze(stage.model, stage.trainable)
    stage.model.pack(False)
    clock = _Clock()
    trainer = Trainer(
        _Wrapped(stage),
        TrainingArguments(
            str(folder / "trainer"),
            per_device_train_batch_size=rows,
            num_train_epochs=1,
            learning_rate=OPTIM.rate,
            adam_beta1=OPTIM.betas[0],
            adam_beta2=OPTIM.betas[1],
            weight_decay=OPTIM.weight_decay,
            max_grad_norm=OPTIM.clip_norm,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            remove_unused_columns=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        data_collator=lambda some: {"rows": stage.join(some)},
        train_dataset=stage.rows,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds


def _against_trainer(heat: Heat, name: str, stage: Stage, folder: Path, say: Say) -> Settings:
    """Seconds per row, either side at the best of its batch sizes, in turns."""
    say(f"training: stage {name}")
    ours = {key: functools.partial(_per_row, stage, one) for key, one in stage.ours.items()}
    peer = {str(n): functools.partial(_trainer_per_row, stage, n, folder) for n in heat.batch_rows}
    our_best, our_grid = _best(ours, {key: one.settings for key, one in stage.ours.items()}, " ours", say)
    their_best, their_grid = _best(peer, {str(n): {"batch": n} for n in heat.batch_rows}, " Trainer", say)
    taken = _turns({"ours": ours[our_best], "peer": peer[their_best]}, heat.repeats)
    case: Settings = {"case": f"stage {name}, seconds per row", **ratio(taken["ours"], taken["peer"], heat.bar)}
    case["ours"] = {**side(stage.ours[our_best].settings, taken["ours"]), "grid": our_grid}
    case["peer"] = {**side({"batch": int(their_best)}, taken["peer"]), "grid": their_grid}
    say(verdict(case))
    return case


def _per_row(stage: Stage, ours: Ours) -> float:
    return _learn(stage, ours.at, ours.steps) / ours.rows


def _trainer_per_row(stage: Stage, rows: int, folder: Path) -> float:
    return _trainer_seconds(stage, rows, folder) / len(stage.rows)


def _turns(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds per row of every repeat; sides take turns (A B, A B, ...)."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            taken[name].append(run())
    return taken


def _best(
    sides: Mapping[str, Callable[[], float]], settings: Mapping[str, Settings], title: str, say: Say
) -> tuple[str, list[Settings]]:
    """Which setting takes least per row, each at the better of two turns, and the whole grid."""
    taken = _turns(sides, 2)
    grid = [{**settings[key], "seconds": min(taken[key])} for key in sides]
    say(f"{title}:")
    for tried in grid:
        say(f"  {describe({**tried, 'seconds': 1000 * tried['seconds']})} ms per row")
    return min(sides, key=lambda key: min(taken[key])), grid


def _loader(heat: Heat, name: str, stage: Stage, say: Say) -> Settings:
    """How many times the loader could feed the steps of the same batches, both alone."""
    ours = list(stage.ours.values())[-1]
    ready = [ours.at(step) for step in range(ours.steps)]

    def load() -> float:
        begin = time.perf_counter()
        for step in range(ours.steps):
            ours.at(step)
        return (time.perf_counter() - begin) / ours.rows

    taken = _turns({"loader": load, "steps": lambda: _learn(stage, ready.__getitem__, ours.steps) / ours.rows}, 3)
    case: Settings = {"case": f"stage {name}, loader alone against its steps"}
    case |= ratio(taken["loader"], taken["steps"], heat.loader_bar)
    case |= {"ours": side(ours.settings, taken["loader"]), "peer": side(ours.settings, taken["steps"])}
    say(verdict(case))
    return case


def _ranks(heat: Heat, folder: Path, say: Say) -> Settings:
    """Seconds per row of stage 1 in two processes of one thread, and in one."""
    taken: dict[int, list[float]] = {2: [], 1: []}
    for turn in range(heat.rank_turns):
        for world, seconds in taken.items():
            work = functools.partial(_rank, heat, folder, world, turn)
            found = list(in_processes(work, range(world), world, 1))
            seconds.append(max(spent for _, spent in found) / sum(rows for rows, _ in found))
    case: Settings = {"case": "stage align, two ranks against one", **ratio(taken[2], taken[1], heat.ranks_bar)}
    settings = {"threads": 1, "cores": cores()}
    case |= {"ours": side({"ranks": 2, **settings}, taken[2]), "peer": side({"ranks": 1, **settings}, taken[1])}
    say(verdict(case))
    return case


def _rank(heat: Heat, folder: Path, world: int, turn: int, rank: int) -> tuple[int, float]:
    """One process of `world`: rows and seconds of its steps, behind two that do not count."""
    torch.set_num_threads(1)
    lab = _lab(heat, folder)
    rows, tokens = _pool(heat, lab, "align"), heat.tokens[-1]
    budget = Budget(tokens, tokens * heat.sound_seconds_per_token)
    mixture = Mixture([_Pool(lab, rows)], budget, 0, rank, world)
    stage = Stage(lab.model, lab.recipe.stage("align").trainable, rows, lab.batch, "text")
    ranks = Ranks.join(rank, world, folder / f"meeting-{world}-{turn}") if world > 1 else Ranks()
    at = functools.partial(_mixed, lab, rows, mixture)
    _learn(stage, at, 2, ranks)
    ranks.agree(0)
    seconds = _learn(stage, at, heat.rank_steps, ranks)
    ranks.leave()
    return sum(len(mixture.at(step)) for step in range(heat.rank_steps)), seconds
