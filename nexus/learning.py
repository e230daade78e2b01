"""`nexus train`, whole: where the rows of each stage come from, and what guards them.

A stage learns from the files of `data.train` or the recordings of `data.root`, beside a share of `data.replay` of what
the initial model was made of. A stage that trains the voice learns from prepared speech: the folder `data.prepared`, or
one that is made here, with the model as the stage before it left it, of the answers in `data.train` that have a sound.
"""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus.data.chat import ChatTokenizer
from nexus.data.jsonl import lines_of, read_row
from nexus.data.mixture import Mixture, Source
from nexus.data.prepared import Prepared, SpeechBatches
from nexus.data.sources import sources
from nexus.data.stream import Budget
from nexus.demo.digits import digit_sources
from nexus.demo.replay import ROWS_PER_UTTERANCE, UTTERANCES, Replay, ReplayedSpeech, exam_rows, retold
from nexus.errors import BadConfig
from nexus.eval.regression import Rows, held_out, measure
from nexus.model.folder import read_config
from nexus.model.omni import OmniModel
from nexus.processes import cores
from nexus.progress import Progress
from nexus.recipe import Recipe, StageConfig
from nexus.respond import OmniResponder, load
from nexus.train.gate import Gate
from nexus.train.loader import Batches
from nexus.train.parallel import Ranks
from nexus.train.prepare import Lines, open_prepared, prepare
from nexus.train.run import train
from nexus.types import Audio, Sample

SEED = 0  # of the order of rows
SPOKEN_AGAIN = 300  # sentences of the initial model's own voice beside a user's


def learn(
    recipe: Recipe,
    init: Path,
    out: Path,
    *,
    stages: Sequence[str] | None = None,
    allow_inexact: bool = False,
    progress: Progress,
) -> dict[str, Any]:
    """Train `recipe` on its own `data`, from model folder to model folder; returns what stands in run.json.

    `stages` are those to train (default: all that the data have rows for). Raises as `nexus.train.run.train`, and
    BadConfig for data that no stage can learn from.
    """
    if os.environ.get("RANK", "0") != "0":
        progress = Progress(io.StringIO())  # one of several that torchrun started is enough to read
    chosen = [stage.name for stage in recipe.stages] if stages is None else list(stages)
    _check(recipe, init, chosen)
    mute = [name for name in chosen if _speaks(recipe.stage(name)) and not _has_speech(recipe, name)]
    if mute and stages is not None:
        raise BadConfig(
            f"stage {mute[0]} trains the voice, and no row has an answer with a sound; add some to data.train, name "
            "data.prepared, or leave the stage out"
        )
    for name in mute:
        progress.say(f"{name}: left out, no row has an answer with a sound")
    deaf = [name for name in chosen if _hears(recipe.stage(name)) and not _has_sound(recipe, name)]
    if deaf and stages is not None:
        raise BadConfig(f"stage {deaf[0]} trains hearing alone, and no row has a sound; leave the stage out")
    for name in deaf:
        progress.say(f"{name}: left out, no row has a sound")
    chosen = [name for name in chosen if name not in (*mute, *deaf)]
    feed = _Feed(recipe, init, out, chosen, progress)
    gate = None if recipe.gate is None else lambda ranks: _gate(recipe, init, out, ranks, progress)
    return train(recipe, init, out, feed, stages=chosen, gate=gate, allow_inexact=allow_inexact, progress=progress)


def _check(recipe: Recipe, init: Path, chosen: Sequence[str]) -> None:
    data = recipe.data
    if not data.train and data.root is None and data.prepared is None:
        raise BadConfig(
            f"recipe {recipe.name} names no data: give --set data.train=FILE.jsonl, or data.root=DIR of recordings"
        )
    if data.train and data.root is not None:
        raise BadConfig("data.train and data.root are both given, expected one of them; train on one after the other")
    if data.noise is not None and data.root is None:
        raise BadConfig("data.noise is mixed into the recordings of data.root, which is not given; leave it out")
    read_config(init)
    for stage in map(recipe.stage, chosen):
        for file in () if _speaks(stage) and data.prepared is not None else _files(recipe, stage.name):
            if not file.is_file():
                raise BadConfig(f"data.train: {file}: no such file; name files of rows (see docs/data.md)")
    if isinstance(data.train, tuple):
        for name in (name for source in data.train for name in source.stages):
            recipe.stage(name)


def _speaks(stage: StageConfig) -> bool:
    """Whether a stage trains the voice, which learns from prepared speech."""
    return all(glob.startswith("voice.") for glob in stage.trainable)


def _hears(stage: StageConfig) -> bool:
    """Whether a stage trains nothing but hearing."""
    return all(glob.startswith("hearing.") for glob in stage.trainable)


def _has_sound(recipe: Recipe, stage: str) -> bool:
    """Whether something is heard: recordings, what is replayed, cuts, or rows that ask with a sound."""
    files = _files(recipe, stage)
    if recipe.data.root is not None or recipe.data.replay or any(file.suffix != ".jsonl" for file in files):
        return True
    return any(
        isinstance(part, Audio)
        for file in files
        for row in _rows(file)
        for turn in row.turns
        if turn.role == "user"
        for part in turn.parts
    )


def _has_speech(recipe: Recipe, stage: str) -> bool:
    files = [file for file in _files(recipe, stage) if file.suffix == ".jsonl"]
    return recipe.data.prepared is not None or any(_is_spoken(row) for file in files for row in _rows(file))


def _rows(file: Path) -> Iterator[Sample]:
    """The rows of a file from its beginning, for a look that ends at the first row of a kind."""
    return (read_row(line, f"{file}:{number}", file.parent) for number, _, line in lines_of(file))


def _spoken_rows(recipe: Recipe, stage: str) -> Iterator[tuple[Lines, int]]:
    """The rows of a stage's JSONL files that have an answer with a sound."""
    for file in (file for file in _files(recipe, stage) if file.suffix == ".jsonl"):
        lines = Lines(file)
        yield from ((lines, row) for row in range(len(lines)) if _is_spoken(lines[row]))


def _files(recipe: Recipe, stage: str) -> list[Path]:
    """The files that a stage learns from."""
    named = recipe.data.train
    if isinstance(named, str):
        return [Path(named)] if named else []
    return [Path(one.path) for one in named if not one.stages or stage in one.stages]


def _is_spoken(sample: Sample) -> bool:
    return any(isinstance(part, Audio) for turn in sample.turns if turn.role == "assistant" for part in turn.parts)


@dataclass(frozen=True)
class _Feed:
    """From a stage to this rank's batches."""

    recipe: Recipe
    init: Path
    out: Path
    chosen: Sequence[str]
    progress: Progress

    def __call__(self, stage: StageConfig, ranks: Ranks) -> Batches:
        batches = self._spoken if _speaks(stage) else self._heard
        return ranks.first(f"rows of {stage.name}", lambda: batches(stage, ranks.rank, ranks.world))

    def _heard(self, stage: StageConfig, rank: int, world: int) -> Batches:
        data = self.recipe.data
        if data.root is not None:
            noise = None if data.noise is None else Path(data.noise)
            named = digit_sources(data, stage.name, self.init, self.out, noise, cores(), self.progress)
        else:
            named = self._files(stage)
        mixture = Mixture(named, Budget(data.tokens_per_batch, data.audio_seconds_per_batch), SEED, rank, world)
        seen = mixture.padding(0)
        self.progress.say(
            f"{stage.name}: {seen.rows} rows an epoch in {mixture.batches_per_epoch} steps, {seen.tokens} positions "
            f"({seen.token_share:.1%} padding), {seen.audio_frames / 100:.0f} s of sound ({seen.audio_share:.1%})"
        )
        return mixture

    def _files(self, stage: StageConfig) -> list[Source]:
        data, (specs, _) = self.recipe.data, read_config(self.init)
        tokenizer = ChatTokenizer.load(self.init / "tokenizer.json")
        own = sources(data, stage.name, tokenizer, specs, self.out / "indexes")
        if not data.replay:
            return own
        lab = retold(self.init, self.out / "replay", UTTERANCES, cores(), self.progress)
        share = data.replay / (1 - data.replay) * sum(source.weight for source in own)
        return [*own, Replay(lab, stage.name, UTTERANCES * ROWS_PER_UTTERANCE, share)]

    def _spoken(self, stage: StageConfig, rank: int, world: int) -> Batches:
        data = self.recipe.data
        model = self.out / "stages" / self.chosen[self.chosen.index(stage.name) - 1]
        if stage.name == self.chosen[0]:
            model = self.init
        lines = (
            self._prepared(model, stage.name) if data.prepared is None else open_prepared(Path(data.prepared), model)
        )
        return SpeechBatches(
            lines, data.audio_seconds_per_batch, SEED, stage.wrong_codes, stage.wrong_frames, rank, world
        )

    def _prepared(self, model: Path, stage: str) -> Prepared:
        """The spoken answers of the user's rows, and sentences in the initial model's own voice beside them."""
        folder = self.out / "prepared"
        own = list(_spoken_rows(self.recipe, stage))
        again = None
        if self.recipe.data.replay:
            again = ReplayedSpeech(self.init, self.out / "replay", SPOKEN_AGAIN, cores(), self.progress)
        rows = SpokenRows(own, again, self.recipe.data.replay)
        with self.progress.stage("prepare", len(rows), "rows") as watch:
            outcome = prepare(model, rows, folder, tell=watch.advance)
        if outcome.rejected:
            self.progress.say(f"{folder}: {outcome.rejected} rows rejected, see rejects.jsonl there")
        return open_prepared(folder, model)


class SpokenRows:
    """A user's spoken rows, each as often as makes `replay` the share of the sentences that are said `again`."""

    def __init__(self, own: Sequence[tuple[Lines, int]], again: ReplayedSpeech | None, replay: float) -> None:
        self._own, self._again = own, again
        spoken_again = 0 if again is None else len(again)
        self._times = max(1, round(spoken_again * (1 - replay) / replay / len(own))) if spoken_again else 1

    @property
    def fingerprint(self) -> str:
        """Over both parts and how they are mixed."""
        files = sorted({lines.fingerprint for lines, _ in self._own})
        return "-".join([*files, str(self._times), "" if self._again is None else self._again.fingerprint])

    def __len__(self) -> int:
        return self._times * len(self._own) + (0 if self._again is None else len(self._again))

    def __getitem__(self, row: int) -> Sample:
        repeated = self._times * len(self._own)
        if row < repeated:
            lines, place = self._own[row % len(self._own)]
            return lines[place]
        assert self._again is not None
        return self._again[row - repeated]

    def where(self, row: int) -> str:
        """File and line, or which sentence."""
        if row < self._times * len(self._own):
            lines, place = self._own[row % len(self._own)]
            return lines.where(place)
        return f"replayed sentence {row - self._times * len(self._own)}"


def _gate(recipe: Recipe, init: Path, out: Path, ranks: Ranks, progress: Progress) -> Gate:
    """The gate of a recipe on its held-out file, or on rows of the initial model's own data."""
    assert recipe.gate is not None
    responder = load(init)
    name = recipe.gate.held_out or recipe.data.held_out
    rows: Rows
    if name is not None:
        rows = Lines(Path(name))
    else:
        rows = ranks.first("rows of the gate", lambda: exam_rows(init, out / "replay", cores(), progress))
    items, score = held_out(responder, rows, recipe.gate.n), recipe.gate.score

    def measured(model: OmniModel) -> dict[str, list[float]]:
        return measure(OmniResponder(model, responder.tokenizer), items, score)

    return Gate(recipe.gate, measured, out / "gate", items.fingerprint, ranks.rank)
