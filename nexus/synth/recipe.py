"""The recipe of a data set: one YAML file that says from which sources it is made, by which steps, into what.

Strict and frozen like every recipe; a step whose section is missing does not take part.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from nexus.errors import BadConfig
from nexus.organs import Count, Share, Strict
from nexus.recipe import read_settings
from nexus.synth.assemble import AssembleConfig
from nexus.synth.augment import AugmentConfig
from nexus.synth.read import SourceConfig
from nexus.synth.recordings import RecordingsConfig
from nexus.synth.rewrite import RewriteConfig
from nexus.synth.rules import RulesConfig
from nexus.synth.speak import SpeakConfig
from nexus.synth.verify import EarConfig, VerifyConfig

RECIPES = Path(__file__).parent.parent / "recipes" / "synth"


class OutputConfig(Strict):
    """How sounds are kept: `files`, one FLAC file each, or `tar`, WebDataset shards; `shard_samples` to a folder or
    shard, which is brought to the disk as a whole."""

    form: Literal["files", "tar"] = "files"
    shard_samples: Count = 1000


class FailuresConfig(Strict):
    """When a run gives up: more than `share` of the rows failed in one way, once there are `at_least` of them."""

    share: Share = 0.2
    at_least: Count = 20


class SynthRecipe(Strict):
    """Texts in, speech out (`sources`), and recordings in, words out (`recordings`): either, or both.

    `source` is the path of the one source, and of the manifest of recordings, that name none. `recordings` are heard
    by the recognisers of `verify`, and by those of `second_recognisers` (by language) where two have to agree.
    """

    name: str
    description: str = ""
    licence: str = "unknown"  # of the data that are made
    source: str = ""
    sources: tuple[SourceConfig, ...] = ()
    seed: int = 0
    rules: RulesConfig | None = RulesConfig()
    rewrite: RewriteConfig | None = None
    speak: SpeakConfig | None = None
    augment: AugmentConfig | None = None
    verify: VerifyConfig | None = None
    recordings: RecordingsConfig | None = None
    second_recognisers: dict[str, EarConfig] = Field(default_factory=dict)
    assemble: AssembleConfig | None = None
    output: OutputConfig = OutputConfig()
    failures: FailuresConfig = FailuresConfig()
    batch: Count = 16  # samples that a worker takes at a time

    @model_validator(mode="after")
    def _fits(self) -> "SynthRecipe":
        if not self.sources and self.recordings is None:
            raise ValueError("a recipe needs `sources` of texts or `recordings`; it has neither")
        if self.sources and self.speak is None:
            raise ValueError("texts are spoken by `speak`, which is missing; add the section")
        if self.recordings is not None and self.verify is None:
            raise ValueError("recordings are heard by the recognisers of `verify`, which is missing; add the section")
        if sum(not source.path for source in self.sources) > 1:
            raise ValueError("more than one of the sources has no path; `source` can stand for one alone")
        return self

    def text_sources(self) -> tuple[SourceConfig, ...]:
        """The sources, each with its path. Raises BadConfig where `source` is missing."""
        return tuple(self._placed(source) for source in self.sources)

    def recordings_source(self) -> RecordingsConfig | None:
        """The recordings, their manifest with its path. Raises BadConfig where `source` is missing."""
        if self.recordings is None or self.recordings.manifest is None:
            return self.recordings
        return self.recordings.model_copy(update={"manifest": self._placed(self.recordings.manifest)})

    def _placed(self, source: SourceConfig) -> SourceConfig:
        if source.path:
            return source
        if not self.source:
            raise BadConfig(f"recipe {self.name} reads a file of yours: give --set source=FILE")
        return source.model_copy(update={"path": self.source})

    def identity(self) -> dict[str, Any]:
        """Every setting that results depend on. Where sources lie is none: their rows are compared instead."""
        tree = self.model_dump(mode="json", exclude={"source", "batch", "failures"})
        manifest = (tree["recordings"] or {}).get("manifest")
        for source in [*tree["sources"], *([manifest] if manifest else [])]:
            del source["path"]
        return tree

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> "SynthRecipe":
        """Read a shipped recipe by name (`-` and `_` alike), or a YAML file by path, and apply `a.b=value` overrides.

        Raises BadConfig naming file, key, expected and given.
        """
        return read_settings(cls, _find(source), overrides)


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise BadConfig(f"{path}: no such recipe file")
        return path
    shipped = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    name = str(source).replace("_", "-")
    if name not in shipped:
        raise BadConfig(f"no recipe {str(source)!r} of data; shipped: {', '.join(shipped)}, or give FILE.yaml")
    return shipped[name]
