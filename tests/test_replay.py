"""Replay: a demo model's own training rows, made again from its folder alone."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab import PLAIN_WORLD, SMALL_WORLD, small_lab, small_world
from tiny import tiny_model, tiny_recipe, tiny_tokenizer

from nexus.data.chat import render
from nexus.demo.corpus import plan
from nexus.demo.replay import Replay, ReplayedSpeech, Retold, exam_rows, retold, smaller
from nexus.demo.rows import HEARD_TASKS, SILENT_TASKS
from nexus.demo.talks import follow_up_texts, picture_question_texts
from nexus.demo.world import World
from nexus.errors import BadConfig
from nexus.eval.regression import held_out, measure
from nexus.model.folder import save_model
from nexus.progress import Progress
from nexus.respond import OmniResponder
from nexus.types import Audio, Image, Sample, Text, Video

MIXTURES = ("stages.align.mixture={asr: 2, chat: 1}", "stages.sft.mixture={chat: 5, asr: 3, picture: 2, text: 2}")
KINDS = {Audio: "sound", Image: "picture", Video: "film"}


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as the demo leaves it: its config carries the recipe with the world."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    save_model(folder, tiny_model(0), {"recipe": tiny_recipe(PLAIN_WORLD, *MIXTURES).model_dump(mode="json")})
    tiny_tokenizer().save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def lab(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Retold:
    """Its world, spoken again by the real synthesiser."""
    return retold(demo_model, tmp_path_factory.mktemp("cache"), 50, 1, Progress())


def told(sample: Sample) -> list[list[str]]:
    """Words of every turn, and how long or large what is not words is."""
    return [[part.text if isinstance(part, Text) else _size(part) for part in turn.parts] for turn in sample.turns]


def _size(part: Audio | Image | Video) -> str:
    array = part.samples if isinstance(part, Audio) else part.pixels if isinstance(part, Image) else part.frames
    assert array is not None
    return f"{KINDS[type(part)]} {array.shape} {float(array.mean()):.6f}"


def every_task() -> Retold:
    """A lab whose stage 2 learns every task of a whole world."""
    lab = small_lab(0, SMALL_WORLD)
    sft = lab.recipe.stage("sft")
    stage = sft.model_copy(update={"mixture": dict.fromkeys((*HEARD_TASKS, *SILENT_TASKS), 2)})
    stages = tuple(stage if one.name == "sft" else one for one in lab.recipe.stages)
    recipe = lab.recipe.model_copy(update={"stages": stages})
    return Retold(recipe, lab.world, lab.plan, lab.waves, lab.tokenizer, lab.model)


def test_rows_come_in_the_proportions_of_the_models_own_stage(lab: Retold) -> None:
    mixture = lab.recipe.stage("sft").mixture
    rows = Replay(lab, "sft", 2 * sum(mixture.values()))
    counts = dict.fromkeys(mixture, 0)
    for row in range(len(rows)):
        counts[rows[row].task] += 1
    assert counts == {task: 2 * count for task, count in mixture.items()}
    assert {rows[row].task for row in range(10)} <= set(mixture)


def test_stage_one_replays_what_is_heard_alone(lab: Retold) -> None:
    rows = Replay(lab, "align", 24)
    assert {rows[row].task for row in range(24)} == set(lab.recipe.stage("align").mixture)
    assert all(any(isinstance(part, Audio) for part in rows[row].turns[0].parts) for row in range(24))


def test_a_row_is_the_same_whenever_and_in_whatever_order_it_is_asked_for(lab: Retold) -> None:
    first, again = Replay(lab, "sft", 60), Replay(lab, "sft", 60)
    forward = [told(first[row]) for row in range(60)]
    assert [told(again[row]) for row in reversed(range(60))] == forward[::-1]
    assert len({first[row].id for row in range(60)}) == 60
    assert first.fingerprint == again.fingerprint != Replay(lab, "align", 60).fingerprint


def test_recordings_of_a_task_come_once_each_before_one_comes_again(lab: Retold) -> None:
    mixture = lab.recipe.stage("sft").mixture
    heard = len(lab.plan.sets["heard"])
    blocks = heard // mixture["asr"]
    rows = Replay(lab, "sft", blocks * sum(mixture.values()))
    asked = [sample for row in range(len(rows)) if (sample := rows[row]).task == "asr"]
    assert len({told(sample)[0][0] for sample in asked}) == len(asked) == blocks * mixture["asr"]


def test_nothing_of_the_test_is_replayed(lab: Retold) -> None:
    rows = Replay(lab, "sft", 400)
    said = {text for row in range(400) for turn in told(rows[row]) for text in turn}
    world = lab.world
    held_out = {item.question for item in world.questions("test", 100)} | set(world.sentences("test", 100))
    assert not said & held_out


def test_lengths_are_those_of_the_rendered_rows(lab: Retold) -> None:
    rows = Replay(lab, "sft", 48)
    lengths = rows.lengths
    assert len(lengths) == 48
    for row in range(48):
        sample = rows[row]
        assert lengths.tokens[row] == len(render(sample, lab.tokenizer, lab.recipe.model).tokens)
        sounds = [part for turn in sample.turns for part in turn.parts if isinstance(part, Audio)]
        assert lengths.audio_seconds[row] == pytest.approx(sum(sound.seconds for sound in sounds), abs=0.011)
    assert (lengths.windows > 0).sum() == sum(rows[row].task in HEARD_TASKS for row in range(48))


def test_another_process_makes_the_same_rows(lab: Retold) -> None:
    rows = Replay(lab, "sft", 24)
    told(rows[0])
    sent = pickle.loads(pickle.dumps(rows))
    assert [told(sent[row]) for row in range(24)] == [told(rows[row]) for row in range(24)]
    assert sent.fingerprint == rows.fingerprint


def test_a_moved_model_gives_the_same_rows_and_what_was_spoken_is_found_again(
    demo_model: Path, lab: Retold, tmp_path: Path
) -> None:
    shutil.copytree(demo_model, tmp_path / "elsewhere")
    moved = retold(tmp_path / "elsewhere", tmp_path / "cache", 50, 1, Progress())
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.i16")}
    here, there = Replay(lab, "sft", 30), Replay(moved, "sft", 30)
    assert here.fingerprint == there.fingerprint
    assert [told(there[row]) for row in range(30)] == [told(here[row]) for row in range(30)]
    retold(tmp_path / "elsewhere", tmp_path / "cache", 50, 1, Progress())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.i16")} == made


def test_every_task_of_a_world_can_be_replayed() -> None:
    lab = every_task()
    rows = Replay(lab, "sft", 4 * len((*HEARD_TASKS, *SILENT_TASKS)))
    seen: dict[str, set[str]] = {}
    for row in range(len(rows)):
        sample = rows[row]
        render(sample, lab.tokenizer, lab.recipe.model)
        parts = [part for turn in sample.turns for part in turn.parts if not isinstance(part, Text)]
        seen.setdefault(sample.task, set()).update(KINDS[type(part)] for part in parts)
    assert set(seen) == {*HEARD_TASKS, *SILENT_TASKS}
    assert all("sound" in seen[task] for task in HEARD_TASKS)
    assert (seen["avqa"], seen["picture"], seen["film"]) == ({"picture", "sound"}, {"picture"}, {"film"})


def test_speech_is_replayed_in_the_models_own_voice(demo_model: Path, tmp_path: Path) -> None:
    again = ReplayedSpeech(demo_model, tmp_path, 5, 1, Progress())
    assert len(again) == 5
    asked, spoken = again[3].turns
    assert isinstance(asked.parts[0], Text) and asked.parts[0].aloud
    assert isinstance(spoken.parts[0], Audio) and spoken.parts[0].seconds > 0.3
    assert again.fingerprint == ReplayedSpeech(demo_model, tmp_path, 5, 1, Progress()).fingerprint
    assert again.fingerprint != ReplayedSpeech(demo_model, tmp_path / "fewer", 4, 1, Progress()).fingerprint
    responder = OmniResponder(tiny_model(0), tiny_tokenizer())
    assert len(measure(responder, held_out(responder, again, 2))["speech"]) == 2


def test_the_examination_is_what_a_gate_can_measure(demo_model: Path, lab: Retold, tmp_path: Path) -> None:
    rows = exam_rows(demo_model, tmp_path, 1, Progress())
    assert [row.task for row in rows[:4]] == ["asr", "sqa", "typed", "vqa"]
    assert len({row.id for row in rows}) == len(rows) == 20 + 20 + 20 + 12
    responder = OmniResponder(tiny_model(0), tiny_tokenizer())
    scores = measure(responder, held_out(responder, rows, 24))
    assert set(scores) == {"hearing", "text", "vision"}
    assert sum(len(values) for values in scores.values()) == 24
    replay = Replay(lab, "sft", 200)
    learned = {text for row in range(200) for turn in told(replay[row]) for text in turn}
    assert not learned & {told(row)[-1][0] for row in rows if row.task == "asr"}


@settings(deadline=None, max_examples=20)
@given(utterances=st.integers(1, 100_000))
def test_a_smaller_world_leaves_nothing_out_that_was_there(utterances: int) -> None:
    world = small_world()
    found = smaller(world, utterances)
    for name in ("heard", "mandarin", "english", "captioned", "felt", "looked", "followed", "pictures", "films"):
        assert 0 < getattr(found, name) <= getattr(world, name)
    assert found.looked >= len(picture_question_texts()) and found.followed >= len(follow_up_texts())
    assert found.seed == world.seed


def test_a_large_world_becomes_about_as_large_as_asked_and_can_be_planned() -> None:
    large = small_world().model_copy(update={"heard": 15_000, "mandarin": 4_000, "felt": 3_000, "captioned": 2_000})
    found = smaller(large, 600)
    assert 500 < found.heard + found.mandarin + found.english + found.captioned + found.felt < 760
    assert found.mandarin == pytest.approx(found.heard * 4 / 15, rel=0.05)
    assert len(plan(World(0), found).sets["heard"]) == found.heard


def test_what_a_world_lacks_is_not_replayed() -> None:
    world = tiny_recipe(PLAIN_WORLD).world
    assert world is not None
    found = smaller(world, 30)
    assert (found.mandarin, found.looked, found.followed, found.films) == (0, 0, 0, 0)


def test_a_stage_that_learns_from_what_the_world_lacks_is_refused(lab: Retold) -> None:
    stages = tuple(stage.model_copy(update={"mixture": {"film": 1}}) for stage in lab.recipe.stages)
    filmed = replace(lab, recipe=lab.recipe.model_copy(update={"stages": stages}))
    with pytest.raises(BadConfig, match=r"task .film. has nothing to learn from, world\.films is 0"):
        Replay(filmed, "sft", 10)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({}, "its config says no recipe, so its training data cannot be made again; data.replay: set it to 0"),
        (
            {"recipe": tiny_recipe("world=null").model_dump(mode="json")},
            "its recipe nexus-tiny has no world, so its training data cannot be made again; data.replay: set it to 0",
        ),
    ],
)
def test_a_model_that_no_demo_made_is_refused_with_the_next_step(
    tmp_path: Path, about: dict[str, object], message: str
) -> None:
    save_model(tmp_path / "model", tiny_model(0), about)
    with pytest.raises(BadConfig, match=message):
        retold(tmp_path / "model", tmp_path / "cache", 50, 1, Progress())
