"""Stages train exactly what they name, the loop follows its plan to the bit, stand-in heads stay outside the model."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import spelled, tiny_model, tiny_picture, tiny_recipe, tiny_sound, tiny_tokenizer
from torch import Tensor, nn

from nexus.data.chat import render
from nexus.data.collate import collate
from nexus.errors import BadConfig, NexusError
from nexus.model.folder import save_model
from nexus.model.omni import OmniModel
from nexus.recipe import OptimConfig, Recipe, StageConfig
from nexus.train.loop import PROBE_STEPS, Pace, fit, rate_factor
from nexus.train.stage import freeze, frozen_digest, trainable_names
from nexus.train.standins import CHARACTERS, CellNames, CharacterCTC, MannerNames, WordCTC, look_back, look_for_likes
from nexus.types import Batch, Script, SpeechBatch, Text, Turn

STAGES = (*tiny_recipe().standins, *tiny_recipe().stages)
PREFIXES = {
    "codec": ("codec.",),
    "sight": ("vision.",),
    "backbone": ("language.",),
    "ears": ("hearing.encoder.",),
    "align": ("hearing.encoder.", "hearing.adapter."),
    "sft": ("hearing.adapter.", "vision.tower.merger.", "language."),
    "speak": ("voice.",),
}


class Quiet:
    """A watch that remembers what it was told."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.seen: list[float] = []

    def advance(self, count: int = 1, **numbers: float) -> None:
        self.seen.append(numbers["loss"])


def question() -> Batch:
    """A row with sound, a picture and text."""
    parts = (tiny_sound(), tiny_picture(), Text("what is two"))
    turns = [Turn("user", parts), Turn("assistant", (Text("red circle"),))]
    specs = tiny_recipe().model
    return collate([render(turns, tiny_tokenizer(), specs)], tiny_tokenizer().pad, specs)


def whole_loss(model: OmniModel) -> Callable[[int], dict[str, Tensor]]:
    """A loss that every parameter of the model takes part in; what learns from it is the stage's choice alone."""
    batch = question()
    script = Script(torch.randn(1, 3, 32), torch.randn(1, 3, 32), spelled(torch.tensor([[3, 2, 4]])), torch.tensor([3]))
    speech = SpeechBatch(script, torch.randint(16, (1, 8, 12)), torch.tensor([12]))
    waves = torch.from_numpy(tiny_sound(0.4).samples)[None]
    assert model.codec is not None
    codec = model.codec

    def losses(step: int) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed(step)
        total = model(batch)["text"] + model(speech)["speech"] + codec.vocoder_loss(waves, noise)
        return {"loss": total}

    return losses


def test_the_loss_of_these_tests_reaches_every_parameter() -> None:
    model = tiny_model()
    whole_loss(model)(0)["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_moves_exactly_what_it_names(stage: StageConfig) -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    digest = frozen_digest(model, stage.trainable)
    chosen = freeze(model, stage.trainable)
    fit(chosen, stage.optim, whole_loss(model), Pace(1.0, 1, steps=1), Quiet(), bf16=False)
    named = {name for name in before if name.startswith(PREFIXES[stage.name])}
    assert set(chosen) == named and 0 < len(named) < len(before)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == named
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == named
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert frozen_digest(model, stage.trainable) == digest


def test_the_digest_of_the_frozen_part_sees_one_changed_bit_there_and_nothing_elsewhere() -> None:
    model, globs = tiny_model(), ["voice.*"]
    digest = frozen_digest(model, globs)
    with torch.no_grad():
        model.voice.silence.add_(1.0)  # type: ignore[union-attr]
        assert frozen_digest(model, globs) == digest
        weight = model.language.head.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    assert frozen_digest(model, globs) != digest


def test_a_glob_that_matches_nothing_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(BadConfig, match=r"'hearing.adaptor.\*' matches no parameter; there are .*hearing.adapter"):
        trainable_names(model, ["voice.*", "hearing.adaptor.*"])
    with pytest.raises(BadConfig):
        freeze(model, ["hearing"])


def test_every_glob_of_the_shipped_recipe_fits_its_own_model() -> None:
    recipe = Recipe.load("nexus-tiny")
    with torch.device("meta"):
        model = OmniModel(recipe.model)
    for stage in (*recipe.standins, *recipe.stages):
        assert all(name.startswith(PREFIXES[stage.name]) for name in trainable_names(model, stage.trainable))
        for glob in (*stage.optim.rates, *stage.optim.muon):
            assert trainable_names(model, [glob])


def test_a_rate_factor_slows_the_parameters_it_names() -> None:
    def moved(rates: dict[str, float]) -> dict[str, float]:
        model = nn.ModuleDict({"slow": nn.Linear(3, 3), "quick": nn.Linear(3, 3)})
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        optim = OptimConfig(rate=0.1, rates=rates, warmup_steps=0, weight_decay=0.0)
        losses = lambda step: {"loss": torch.stack([p.sum() for p in model.parameters()]).sum()}  # noqa: E731
        fit(dict(model.named_parameters()), optim, losses, Pace(1.0, 1, steps=1), Quiet(), bf16=False)
        return {name: float((1 - p.detach()).mean()) for name, p in model.named_parameters()}

    same, apart = moved({}), moved({"slow.*": 0.25})
    assert apart["slow.weight"] == pytest.approx(0.25 * same["slow.weight"], rel=1e-3)
    assert apart["quick.weight"] == pytest.approx(same["quick.weight"])


def test_the_rate_warms_up_stays_and_falls_to_its_last_share() -> None:
    optim = OptimConfig(warmup_steps=10, decay_from=0.5, final_factor=0.1)
    factors = [rate_factor(step, 100, optim) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert factors[10:51] == [1.0] * 41
    assert all(b < a for a, b in itertools.pairwise(factors[50:]))
    assert factors[75] == pytest.approx(0.55) and factors[100] == pytest.approx(0.1)


@given(st.integers(0, 200), st.integers(0, 80), st.floats(0.1, 0.9), st.integers(1, 6))
def test_the_rate_of_the_probe_is_the_same_once_the_length_is_known(
    more: int, warmup: int, decay_from: float, looks: int
) -> None:
    optim, taken = OptimConfig(warmup_steps=warmup, decay_from=decay_from), looks * PROBE_STEPS
    steps = Pace(1.0, 1).decide(taken, more, decay_from)
    assert steps >= taken + more
    for step in range(taken):
        assert rate_factor(step, None, optim) == rate_factor(step, steps, optim)


def test_a_length_is_fixed_by_the_speed_of_a_fifth_of_the_time_not_of_the_first_steps() -> None:
    """A stage whose first steps were fast, because nothing ran beside them yet, does not run over its time."""
    parameter = nn.Parameter(torch.ones(1))

    def losses(step: int) -> dict[str, Tensor]:
        time.sleep(0.0 if step < PROBE_STEPS else 0.01)
        return {"loss": (parameter**2).sum()}

    pace, begun = Pace(1.5, 1), time.perf_counter()
    fit({"p": parameter}, OptimConfig(), losses, pace, Quiet(), bf16=False)
    assert pace.steps is not None and PROBE_STEPS * 2 <= pace.steps <= 300  # 1.5 s at the first speed are thousands
    assert time.perf_counter() - begun < 6.0


def test_a_pace_leaves_no_stage_without_its_fewest_steps_or_its_decay() -> None:
    pace = Pace(seconds=10.0, min_steps=30)
    assert pace.decide(PROBE_STEPS, 175, 0.4) == 200
    assert pace.decide(PROBE_STEPS, 1, 0.4) == 30
    assert Pace(0.0, 1).decide(PROBE_STEPS, -3, 0.4) == PROBE_STEPS + 1
    assert pace.decide(100, 20, 0.4) == 250
    assert pace.decide(100, 20, 0.0) == 120


def voice_run(pace: Pace, watch: Quiet, told: list[int]) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    stage = tiny_recipe().stage("speak")
    model = tiny_model(1)
    torch.manual_seed(2)
    losses = whole_loss(model)
    curve = fit(freeze(model, stage.trainable), stage.optim, losses, pace, watch, bf16=False, planned=told.append)
    return model.state_dict(), curve


def test_the_same_plan_gives_the_same_weights_to_the_bit() -> None:
    measured, first_watch, told = Pace(0.0, 28), Quiet(), list[int]()
    first, curve = voice_run(measured, first_watch, told)
    assert measured.steps == 28 and told == [28] and first_watch.total == 28 and len(first_watch.seen) == 28
    second_watch = Quiet()
    second, _ = voice_run(Pace(0.0, 28, steps=28), second_watch, told)
    assert first_watch.seen == second_watch.seen and first_watch.seen[-1] < first_watch.seen[0]
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert [row["step"] for row in curve] == [20, 28] and curve[-1]["loss"] == first_watch.seen[-1]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_stage_and_leaves_the_weights(broken: float) -> None:
    parameter = nn.Parameter(torch.ones(3))
    steps: list[Tensor] = []

    def losses(step: int) -> dict[str, Tensor]:
        steps.append(parameter.detach().clone())
        return {"loss": parameter.sum() * (broken if step == 4 else 1.0)}

    with pytest.raises(NexusError, match=r"loss is (nan|inf) at step 4; lower optim.rate"):
        fit({"p": parameter}, OptimConfig(), losses, Pace(1.0, 1, steps=9), Quiet(), bf16=False)
    assert len(steps) == 5 and torch.equal(parameter, steps[-1])


def test_gradients_are_clipped_to_the_norm_of_the_recipe() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    losses = lambda step: {"loss": 1e6 * parameter.sum()}  # noqa: E731
    fit({"p": parameter}, OptimConfig(clip_norm=0.5), losses, Pace(1.0, 1, steps=1), Quiet(), bf16=False)
    assert parameter.grad is not None and float(parameter.grad.norm()) == pytest.approx(0.5, rel=1e-4)


def spellings() -> tuple[Tensor, Tensor, list[str]]:
    """States that show one letter per three frames, the last row shorter."""
    texts = ["red two", "it's"]
    states = torch.zeros(2, 24, 32)
    for row, text in enumerate(texts):
        for place, letter in enumerate(text):
            states[row, 3 * place : 3 * place + 3, CHARACTERS.index(letter)] = 1.0
    return states, torch.tensor([21, 12]), texts


def test_spelling_is_learned_from_states_and_padding_is_not_read() -> None:
    states, lengths, texts = spellings()
    head, watch = CharacterCTC(32), Quiet()
    optim = OptimConfig(rate=0.1, warmup_steps=5)
    losses = lambda step: {"loss": head(states, lengths, texts)}  # noqa: E731
    fit(dict(head.named_parameters()), optim, losses, Pace(1.0, 1, steps=60), watch, bf16=False)
    assert watch.seen[-1] < 0.3 * watch.seen[0] and head.read(states, lengths) == texts
    noisy = states.clone()
    noisy[1, 12:] = torch.randn(12, 32)
    assert head.read(noisy, lengths) == texts
    assert torch.equal(head(noisy, lengths, texts), head(states, lengths, texts))


def test_tokens_come_to_lie_beside_the_words_for_what_they_show() -> None:
    torch.manual_seed(0)
    names = [torch.randn(3, 32), 0.1 * torch.randn(2, 32)]
    labels = torch.tensor([[0, 1], [2, 0], [1, 1], [2, 1]])
    tokens, head, watch = nn.Parameter(torch.randn(4, 32)), CellNames(names), Quiet()
    losses = lambda step: {"loss": head(tokens, labels)}  # noqa: E731
    learned = {"tokens": tokens, **dict(head.named_parameters())}
    fit(learned, OptimConfig(rate=0.1, warmup_steps=5), losses, Pace(1.0, 1, steps=60), watch, bf16=False)
    assert watch.seen[-1] < 0.1 < watch.seen[0]
    for known, right in zip(names, labels.T, strict=True):
        likeness = nn.functional.cosine_similarity(tokens[:, None], known[None], dim=-1)
        assert torch.equal(likeness.argmax(1), right)
    assert torch.allclose(head(5 * tokens, labels), head(tokens, labels))  # whatever a token's length


def test_every_second_head_begins_by_looking_for_what_is_like_the_token_that_looks() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    look_for_likes(model)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.rpartition(".layers.")[0] for name in changed} == {"language.backbone", "hearing.encoder"}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "query"}

    config, seen = model.config.language, torch.eye(model.config.language.width)
    attention = model.language.backbone.layers[0].self_attn
    width, shared = config.width // config.heads, config.heads // config.kv_heads
    queries = (seen @ attention.q_proj.weight.T).view(len(seen), config.heads, width)
    keys = (seen @ attention.k_proj.weight.T).view(len(seen), config.kv_heads, width)
    for head in range(config.heads):
        likes = queries[:, head] @ keys[:, head // shared].T
        assert torch.equal(likes, likes.T) is (head % 2 == 0)
        assert bool((likes.diagonal() > 0).all()) is (head % 2 == 0)


def test_the_last_heads_of_the_first_layer_begin_by_looking_one_and_two_tokens_back() -> None:
    torch.manual_seed(0)
    language = (
        "{vocab_size: 400, width: 256, layers: 2, heads: 4, kv_heads: 2, ffn_width: 64, mrope_section: [8, 12, 12]}"
    )
    model = tiny_model(0, f"model.language={language}")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    look_back(model)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    first = "language.backbone.layers.0.self_attn."
    assert changed == {first + name for name in ("q_proj.weight", "q_proj.bias", "k_proj.bias")}

    looks: list[Tensor] = []
    backbone: Any = model.language.backbone
    backbone.config._attn_implementation = "eager"
    backbone.layers[0].self_attn.register_forward_hook(lambda module, args, out: looks.append(out[1]))
    with torch.no_grad():
        backbone(inputs_embeds=torch.randn(1, 40, model.config.language.width))
    ((weights,),) = looks  # [heads, to, from]
    config = model.config.language
    for distance, head in enumerate(range(config.heads - config.heads // config.kv_heads, config.heads), start=1):
        seen = weights[head].diagonal(-distance)
        assert float(seen[distance:].min()) > 0.5, (head, distance)
    for head in range(config.heads // config.kv_heads):
        assert float(weights[head].diagonal(-1).mean()) < 0.3


def test_manners_are_named_from_states_and_only_what_is_asked_for_counts() -> None:
    torch.manual_seed(0)
    states, lengths = torch.randn(4, 9, 32), torch.tensor([9, 5, 9, 7])
    states[1::2] += 1.0  # the first attribute lies in the mean
    states[2:] *= 2.0  # the second in the spread
    labels = torch.tensor([[0, 0], [1, 0], [0, 1], [1, -1]])
    head, watch = MannerNames(32, (2, 2)), Quiet()
    losses = lambda step: {"loss": head(states, lengths, labels)}  # noqa: E731
    optim = OptimConfig(rate=0.1, warmup_steps=5)
    fit(dict(head.named_parameters()), optim, losses, Pace(1.0, 1, steps=60), watch, bf16=False)
    assert watch.seen[-1] < 0.1 < watch.seen[0]
    first, second = (scores.argmax(1).tolist() for scores in head.scores(states, lengths))
    assert first == [0, 1, 0, 1] and second[:3] == [0, 0, 1]
    noisy = states.clone()
    noisy[1, 5:] = 9.0  # padding is not heard
    assert torch.allclose(head(noisy, lengths, labels), head(states, lengths, labels), atol=1e-6)
    assert float(head(states, lengths, torch.full((4, 2), -1)).detach()) == 0.0


def test_heads_of_stage_nought_train_the_organ_and_are_not_in_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    names = set(model.state_dict())
    assert model.hearing is not None and model.vision is not None
    batch = question()
    assert batch.sound is not None and batch.sight is not None
    ctc, cells = CharacterCTC(32), CellNames([torch.randn(5, 32)] * 2)
    frames = torch.tensor([model.hearing.config.encoder.frames_for(int(n)) for n in batch.sound.lengths])
    loss = ctc(model.hearing.encode(batch.sound), frames, ["red"])
    (loss + cells(model.vision(batch.sight).embeds, torch.zeros(9, 2, dtype=torch.long))).backward()
    assert all(p.grad is not None for p in (*model.hearing.encoder.parameters(), *model.vision.parameters()))
    save_model(tmp_path, model, {})
    assert set(model.state_dict()) == names == set(load_file(tmp_path / "model.safetensors"))


def test_sounds_come_to_lie_beside_the_words_heard_in_them() -> None:
    torch.manual_seed(0)
    head, watch = WordCTC(torch.randn(9, 32)), Quiet()
    embeds, lengths, texts = nn.Parameter(torch.randn(5 + 6, 32)), [5, 6], [[3, 7], [1, 1, 8]]
    losses = lambda step: {"loss": head(embeds, lengths, texts)}  # noqa: E731
    learned = {"embeds": embeds, **dict(head.named_parameters())}
    fit(learned, OptimConfig(rate=0.1, warmup_steps=5), losses, Pace(1.0, 1, steps=80), watch, bf16=False)
    assert watch.seen[-1] < 0.1 < watch.seen[0]
    classes = torch.cat([nn.functional.normalize(head.blank, dim=-1), head.known])
    nearest = (embeds @ classes.T).argmax(1).split(lengths)
    assert [[int(i) - 1 for i in torch.unique_consecutive(row) if i] for row in nearest] == texts
    alone = head(embeds[:5], lengths[:1], texts[:1])  # neither the other sound nor its padding changes a row
    both = head(embeds, lengths, texts)
    assert torch.allclose(2 * both, alone + head(embeds[5:], lengths[1:], texts[1:]), atol=1e-6)
    assert not head(embeds[:1], [1], [[3, 7]]).detach()  # two words in one embedding: nothing can be learned
