"""The gate stops a stage that costs too much, says what and why, compares with the stage's beginning, and measures what
the model would really answer."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import RATE_HZ, tiny_film, tiny_model, tiny_picture, tiny_sound, tiny_tokenizer

from nexus.data.chat import render
from nexus.data.collate import collate
from nexus.errors import BadConfig, BadRecord
from nexus.eval.regression import HeldOut, held_out, measure
from nexus.model.omni import OmniModel
from nexus.recipe import OptimConfig, StageConfig
from nexus.respond import OmniResponder
from nexus.train.gate import Change, Gate, Regressed, paired_change, suspects
from nexus.train.loop import Pace, fit
from nexus.train.stage import freeze
from nexus.training import GateConfig
from nexus.types import Audio, Image, Sample, Text, Turn

CONFIG = GateConfig(max_drop={"text": 0.03, "vision": 0.03})
CARELESS = StageConfig(
    name="sft",
    trainable=("hearing.*", "vision.*", "language.*"),
    mixture={"asr": 16},
    optim=OptimConfig(rate=0.03, warmup_steps=1),
    seconds=0.0,
)
CAREFUL = StageConfig(
    name="sft",
    trainable=("hearing.adapter.*", "vision.tower.merger.*", "language.*"),
    mixture={"asr": 8, "picture": 4, "text": 4},
    optim=OptimConfig(rate=0.0003, warmup_steps=10),
    seconds=0.0,
)


def talk(question: Sequence[Text | Audio | Image], answer: Sequence[Text | Audio], name: str = "x") -> Sample:
    return Sample(name, "chat", (Turn("user", tuple(question)), Turn("assistant", tuple(answer))))


class Scored:
    """A measure that gives one set of scores after the other, and the last one from then on."""

    def __init__(self, *scores: dict[str, list[float]]) -> None:
        self.scores, self.calls = list(scores), 0

    def __call__(self, model: OmniModel) -> dict[str, list[float]]:
        assert not model.training
        self.calls += 1
        return self.scores[min(self.calls, len(self.scores)) - 1]


def good(n: int = 200) -> dict[str, list[float]]:
    return {"text": [1.0] * n, "vision": [1.0, 1.0, 1.0, 0.0] * (n // 4), "hearing": [0.0] * n}


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.floats(-1, 1), st.floats(0.01, 1))
def test_a_skill_that_moves_by_a_constant_has_an_interval_without_width(
    before: list[float], shift: float, allowed: float
) -> None:
    few = CONFIG.model_copy(update={"resamples": 20})
    change = paired_change("text", before, [score + shift for score in before], allowed, few)
    assert change.interval == pytest.approx((shift, shift)) and change.change == pytest.approx(shift)
    if abs(shift + allowed) > 1e-6:
        assert change.holds == (shift > -allowed)


def test_the_interval_is_that_of_the_differences_and_its_lower_end_decides() -> None:
    rng = np.random.default_rng(0)
    before = rng.integers(0, 2, 400).astype(float)
    after = before.copy()
    after[:4] = 1 - after[:4]  # four answers have changed; unpaired, the interval would be 0.1 wide
    change = paired_change("vision", before.tolist(), after.tolist(), 0.03, CONFIG)
    assert -0.02 < change.interval[0] < change.change < change.interval[1] < 0.02 and change.holds
    drop = paired_change("vision", [1.0] * 400, [1.0] * 384 + [0.0] * 16, 0.05, CONFIG)
    assert drop.change == pytest.approx(-0.04) and drop.interval[0] < -0.05 and not drop.holds
    wide = GateConfig(max_drop={"vision": 0.05}, confidence=0.75)
    assert paired_change("vision", [1.0] * 400, [1.0] * 384 + [0.0] * 16, 0.05, wide).holds


def test_what_the_recipe_does_not_name_is_measured_and_not_gated(tmp_path: Path) -> None:
    model = tiny_model()
    scored = Scored(good(), good() | {"hearing": [-9.0] * 200})
    gate = Gate(CONFIG, scored, tmp_path, "items")
    gate.begin(CAREFUL, model)
    changes = {change.skill: change for change in gate.check(model, 10)}
    assert changes["hearing"].max_drop is None and changes["hearing"].change == -9.0 and changes["hearing"].holds
    assert changes["vision"] == Change("vision", 200, 0.75, 0.75, 0.0, (0.0, 0.0), 0.03)


def test_a_fall_stops_the_run_with_skill_numbers_interval_stage_and_likely_settings(tmp_path: Path) -> None:
    model = tiny_model()
    after = good() | {"vision": [0.0] * 150 + [1.0] * 50}
    gate = Gate(CONFIG, Scored(good(), after), tmp_path, "items")
    gate.begin(CARELESS, model)
    with pytest.raises(Regressed) as stop:
        gate.check(model, 40)
    said = str(stop.value)
    assert "\n" not in said
    assert said.startswith("stage sft, step 40: vision went from 0.75 to 0.25 on 200 held-out items")
    for part in ("a change of -0.5", "paired interval -0.", "a drop of 0.03 is allowed", "no rows with picture"):
        assert part in said
    assert "vision.tower (stages.trainable)" in said and "optim.rate 0.03" in said
    kept = json.loads((tmp_path / "sft.json").read_text())["checks"]
    assert kept[0]["step"] == 40 and {change["skill"] for change in kept[0]["changes"]} == set(good())


def test_too_few_items_are_said_to_be_too_few(tmp_path: Path) -> None:
    model = tiny_model()
    config = GateConfig(max_drop={"text": 0.3})
    gate = Gate(config, Scored({"text": [1.0] * 5}, {"text": [1.0] * 4 + [0.0]}), tmp_path, "items")
    gate.begin(CAREFUL, model)
    with pytest.raises(Regressed, match=r"from 1 to 0\.8 on 5 held-out items.*; so few items cannot tell: give the"):
        gate.check(model, 1)


def test_a_gated_skill_without_items_is_refused_before_training(tmp_path: Path) -> None:
    gate = Gate(CONFIG, Scored({"text": [1.0, 0.0]}), tmp_path, "items")
    with pytest.raises(BadConfig, match=r"gate.max_drop names vision, but the held-out items measure text 2; add such"):
        gate.begin(CAREFUL, tiny_model())
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_is_compared_with_the_beginning_of_its_stage(tmp_path: Path) -> None:
    model, worse = tiny_model(), good() | {"text": [0.0] * 200}
    first = Gate(CONFIG, Scored(good(), good()), tmp_path, "items")
    first.begin(CAREFUL, model)
    first.check(model, 5)
    scored = Scored(worse)
    resumed = Gate(CONFIG, scored, tmp_path, "items")
    resumed.begin(CAREFUL, model)
    assert scored.calls == 0
    with pytest.raises(Regressed, match="text went from 1 to 0"):
        resumed.check(model, 10)
    assert [check["step"] for check in json.loads((tmp_path / "sft.json").read_text())["checks"]] == [5, 10]
    with pytest.raises(BadConfig, match="stage sft began with held-out items items, now they are others; give the"):
        Gate(CONFIG, Scored(good()), tmp_path, "others").begin(CAREFUL, model)


def test_every_rank_keeps_a_book_of_its_own(tmp_path: Path) -> None:
    for rank in range(2):
        gate = Gate(CONFIG, Scored(good()), tmp_path, "items", rank)
        gate.begin(CAREFUL, tiny_model())
        assert gate.check(tiny_model(), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sft.json", "sft.rank-1.json"]


def test_a_frozen_part_that_has_changed_by_one_bit_stops_the_run_also_after_resuming(tmp_path: Path) -> None:
    model = tiny_model()
    gate = Gate(CONFIG, Scored(good()), tmp_path, "items")
    gate.begin(CAREFUL, model)
    with torch.no_grad():
        model.language.head.weight[0, 0] += 1.0  # what the stage trains
        gate.check(model, 1)
        weight = model.hearing.encoder.conv1.weight  # type: ignore[union-attr]
        weight[0, 0, 0] = torch.nextafter(weight[0, 0, 0], torch.tensor(9.0))
    with pytest.raises(Regressed, match=r"sft may train hearing.adapter.*, but other parameters have changed: digest"):
        gate.check(model, 2)
    with pytest.raises(Regressed, match="other parameters have changed"):
        Gate(CONFIG, Scored(good()), tmp_path, "items").begin(CAREFUL, model)


def test_scores_that_are_no_numbers_stop_the_run(tmp_path: Path) -> None:
    model = tiny_model()
    gate = Gate(CONFIG, Scored(good(), good() | {"text": [float("nan")] * 200}), tmp_path, "items")
    gate.begin(CAREFUL, model)
    with pytest.raises(Regressed, match="cannot measure text: some item scores NaN or infinity"):
        gate.check(model, 1)


def test_checks_are_due_every_so_many_steps_and_a_model_in_training_stays_in_training(tmp_path: Path) -> None:
    gate = Gate(CONFIG.model_copy(update={"every_steps": 3}), Scored(good()), tmp_path, "items")
    assert [step for step in range(10) if gate.due(step)] == [3, 6, 9]
    assert not any(Gate(CONFIG, Scored(good()), tmp_path, "items").due(step) for step in range(10))
    model = tiny_model().train()
    gate.begin(CAREFUL, model)
    assert model.training


def test_settings_are_suspected_by_what_the_stage_does() -> None:
    model = tiny_model()
    assert suspects("vision", CAREFUL, model)[0].startswith("it trains vision.tower")
    assert suspects("text", CARELESS, model)[0].startswith("its mixture has no rows of plain text")
    voice = CAREFUL.model_copy(update={"trainable": ("voice.*",), "mixture": {"tts": 4}})
    assert suspects("speech", voice, model) == [
        "it trains voice.blocks, voice.codes, voice.embed, voice.embed_norm, voice.heads, voice.letters, voice.norm, "
        "voice.places, voice.silence, voice.start_vector, voice.state, voice.state_norm (stages.trainable)",
        "optim.rate 0.0003 is too high",
    ]


def responder(model: OmniModel) -> OmniResponder:
    return OmniResponder(model, tiny_tokenizer())


def test_what_an_answer_counts_for_follows_from_its_question() -> None:
    rows = [
        talk([Text("two")], [Text("three")]),
        talk([tiny_picture(), Text("where")], [Text("left")]),
        talk([tiny_sound()], [Text("red")]),
        talk([tiny_picture(), tiny_sound()], [Text("blue")]),
        Sample("film", "film", (Turn("user", (tiny_film(),)), Turn("assistant", (Text("red"),)))),
        talk([tiny_sound()], [Text("red"), tiny_sound(0.4)]),
        talk([Text("red circle", aloud=True)], [tiny_sound(0.5)]),
    ]
    items = held_out(responder(tiny_model()), rows, 100)
    assert items.skills == ["text", "vision", "hearing", "vision", "vision", "hearing", None]
    assert [number for number, _, _ in items.spoken] == [5, 6]
    scores = measure(responder(tiny_model()), items)
    assert {skill: len(found) for skill, found in scores.items()} == {"text": 1, "vision": 3, "hearing": 2, "speech": 2}


def test_a_likelihood_is_the_models_own_loss_on_the_row_alone() -> None:
    model = tiny_model()
    rows = [talk([tiny_sound(0.5 + n / 5, n)], [Text("red circle " * (1 + n % 3))]) for n in range(11)]
    found = measure(responder(model), held_out(responder(model), rows, 11), "likelihood")["hearing"]
    for row, value in zip(rows, found, strict=True):
        batch = collate([render(row, tiny_tokenizer(), model.config)], tiny_tokenizer().pad, model.config)
        with torch.no_grad():
            assert value == pytest.approx(-float(model(batch)["text"]), abs=1e-4)


def test_speech_is_scored_by_the_voices_loss_and_falls_with_a_worse_voice() -> None:
    model = tiny_model()
    rows = [talk([Text("two")], [Text("red circle"), tiny_sound(0.6, n)]) for n in range(3)]
    items = held_out(responder(model), rows, 3)
    before = measure(responder(model), items)["speech"]
    assert all(-6 < score < -2 for score in before)  # about log(17) without training
    with torch.no_grad():
        model.voice.heads.weight.mul_(40)  # type: ignore[union-attr]
    assert max(measure(responder(model), items)["speech"]) < min(before)


def test_held_out_rows_are_spread_over_the_file_and_told_apart_by_their_content() -> None:
    rows = [talk([Text("two")], [Text(word)]) for word in ("red circle blue square where left right".split() * 5)]
    asker = responder(tiny_model())
    some = held_out(asker, rows, 7)
    assert len(some.rows) == 7 and some.fingerprint == held_out(asker, rows, 7).fingerprint
    assert some.rows[1].tokens == held_out(asker, [rows[5]], 1).rows[0].tokens
    assert len(held_out(asker, rows, 99).rows) == 35
    sounds = [held_out(asker, [talk([tiny_sound(seed=seed)], [Text("red")])], 1).fingerprint for seed in range(2)]
    assert len({some.fingerprint, *sounds}) == 3


def test_held_out_rows_that_cannot_be_scored_are_refused_by_name() -> None:
    asker = responder(tiny_model())
    with pytest.raises(BadRecord, match="held-out row q: has no answer"):
        held_out(asker, [Sample("q", "chat", (Turn("user", (Text("two"),)),))], 1)
    with pytest.raises(BadRecord, match="held-out row x: an answer has a sound and no words"):
        held_out(asker, [talk([Text("two")], [tiny_sound()])], 1)
    with pytest.raises(BadRecord, match="held-out row x: an answer has 2 sounds"):
        held_out(asker, [talk([Text("two")], [Text("red"), tiny_sound(), tiny_sound()])], 1)


def test_sound_of_answers_needs_a_codec() -> None:
    silent = responder(tiny_model(0, "model.voice=null", "model.codec=null"))
    with pytest.raises(BadRecord, match="this model has no codec of its own; leave their sound out"):
        held_out(silent, [talk([Text("two")], [Text("red"), tiny_sound()])], 1)


class Quiet:
    total: int | None = None

    def advance(self, n: int = 1, **values: float) -> None:
        pass


def learn(model: OmniModel, stage: StageConfig, draw: Callable[[int], list[Sample]], steps: int) -> None:
    def losses(step: int) -> dict[str, torch.Tensor]:
        rows = [render(sample, tiny_tokenizer(), model.config) for sample in draw(step)]
        return {"loss": model(collate(rows, tiny_tokenizer().pad, model.config))["text"]}

    model.train()
    fit(freeze(model, stage.trainable), stage.optim, losses, Pace(0.0, 1, steps=steps), Quiet(), bf16=False)
    model.eval()


def test_an_answer_is_exact_when_the_model_would_write_it() -> None:
    model = tiny_model()
    rows = [talk([Text(question)], [Text(answer)]) for question, answer in (("two", "red circle"), ("five", "blue"))]
    everything = CARELESS.model_copy(update={"optim": OptimConfig(rate=0.01, warmup_steps=5)})
    learn(model, everything, lambda step: rows, 40)
    asked = [row.turns[:1] for row in rows]
    written = [reply.text for reply in responder(model).answer_many(asked)]
    assert written == ["red circle", "blue"]
    others = [talk([Text("two")], [Text("red")]), talk([Text("two")], [Text("red circle blue")]), *rows]
    assert measure(responder(model), held_out(responder(model), others, 4)) == {"text": [0.0, 0.0, 1.0, 1.0]}


COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30), "white": (240, 240, 240)}
SUMS = {("two", "three"): "five", ("two", "two"): "four", ("one", "two"): "three", ("three", "three"): "six"}
PITCHES = {"left": 200.0, "right": 1500.0}


def seen(rng: random.Random) -> Sample:
    name = rng.choice(list(COLOURS))
    noise = np.random.default_rng(rng.getrandbits(32)).integers(-25, 26, (84, 84, 3))
    pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
    return talk([Image(pixels=pixels), Text("what")], [Text(name)])


def heard(rng: random.Random) -> Sample:
    name = rng.choice(list(PITCHES))
    at = np.arange(6400) / RATE_HZ
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(at))
    wave = 0.3 * np.sin(2 * np.pi * PITCHES[name] * rng.uniform(0.9, 1.1) * at) + 0.02 * noise
    return talk([Audio(samples=wave.astype(np.float32), rate_hz=RATE_HZ)], [Text(name)])


def typed(rng: random.Random) -> Sample:
    (a, b), answer = rng.choice(list(SUMS.items()))
    return talk([Text(f"what is {a} plus {b}")], [Text(answer)])


def mixed(*kinds: tuple[Callable[[random.Random], Sample], int]) -> Callable[[int], list[Sample]]:
    def draw(step: int) -> list[Sample]:
        rng = random.Random(step)
        return [make(rng) for make, count in kinds for _ in range(count)]

    return draw


@pytest.fixture(scope="module")
def learned() -> dict[str, torch.Tensor]:
    """A very small model that adds in writing and names colours, before it has learned to hear."""
    model = tiny_model()
    stage = replace_stage(CARELESS, trainable=("vision.*", "language.*"), rate=0.004)
    learn(model, stage, mixed((seen, 8), (typed, 8)), 150)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def replace_stage(stage: StageConfig, trainable: tuple[str, ...], rate: float) -> StageConfig:
    return stage.model_copy(update={"trainable": trainable, "optim": OptimConfig(rate=rate, warmup_steps=10)})


@pytest.mark.slow
@pytest.mark.parametrize("stage", [CARELESS, CAREFUL], ids=["careless", "careful"])
def test_a_careless_second_stage_trips_the_gate_and_a_careful_one_does_not(
    stage: StageConfig, learned: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Careless: sound alone, a high rate, encoders unfrozen. Both learn to hear on the same model."""
    model = tiny_model()
    model.load_state_dict(learned)
    rng = random.Random("held out")
    items: HeldOut = held_out(responder(model), [make(rng) for make in (typed, seen, heard) for _ in range(60)], 180)
    gate = Gate(CONFIG, lambda model: measure(responder(model), items), tmp_path, items.fingerprint)
    gate.begin(stage, model)
    before = json.loads((tmp_path / "sft.json").read_text())["before"]
    assert np.mean(before["text"]) > 0.95 and np.mean(before["vision"]) > 0.95, "it has not learned what it is to keep"
    careless = stage is CARELESS
    learn(model, stage, mixed((heard, 16)) if careless else mixed((heard, 8), (seen, 4), (typed, 4)), 40)
    if careless:
        with pytest.raises(Regressed, match=r"stage sft, step 40: (text|vision) went from .*; most likely at fault: "):
            gate.check(model, 40)
    else:
        assert {change.skill: change.holds for change in gate.check(model, 40)} == dict.fromkeys(before, True)
