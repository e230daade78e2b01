"""Adapters: they begin as nothing, train alone, are what PEFT computes, and are what load_adapter merges again."""

import json
from pathlib import Path

import pytest
import torch
from launch import Rows, model_folder, recipe_for
from safetensors.torch import load_file
from tiny import tiny_model
from torch import nn

from nexus.errors import BadConfig
from nexus.model.adapters import load_adapter
from nexus.model.folder import load_model
from nexus.train.lora import LoraLinear, adapt, merged
from nexus.train.run import train
from nexus.training import LoraConfig

LORA = LoraConfig(rank=4, alpha=8.0)
TRAINABLE = ("hearing.adapter.*", "language.*")


def test_an_adapter_begins_as_nothing_and_is_the_same_on_every_rank() -> None:
    model, again = tiny_model(), tiny_model()
    before = dict(model.state_dict())
    names = adapt(model, TRAINABLE, LORA, seed=0)
    assert adapt(again, TRAINABLE, LORA, seed=0) == names
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    assert len(layers) == 2 * 7  # q k v o gate up down
    assert all(torch.equal(merged(layer), layer.weight) for layer in layers)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)
    left, right = (dict(m.named_parameters()) for m in (model, again))
    assert all(torch.equal(left[name], right[name]) for name in names)


def test_what_trains_is_the_adapters_and_what_is_trained_whole() -> None:
    names = adapt(tiny_model(), TRAINABLE, LORA, seed=0)
    assert {name.rpartition(".")[2] for name in names if name.startswith("language.")} == {"lora_a", "lora_b"}
    whole = [name for name in names if not name.startswith("language.")]
    assert whole and all(name.startswith("hearing.adapter.") for name in whole)


def test_targets_outside_of_what_is_trained_are_refused() -> None:
    with pytest.raises(BadConfig, match=r"engine.lora.targets .*vision.* name no linear layer .*language"):
        adapt(tiny_model(), ["language.*"], LoraConfig(targets=("vision.*",)), seed=0)


def test_an_adapted_layer_computes_what_peft_computes() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    ours = nn.Sequential(*(LoraLinear(m, 2, 4.0, torch.Generator()) if isinstance(m, nn.Linear) else m for m in base))
    for layer in (ours[0], ours[2]):
        nn.init.normal_(layer.lora_b)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0", "2"]), base)
    with torch.no_grad():
        for number in (0, 2):
            theirs[number].lora_A["default"].weight.copy_(ours[number].lora_a)
            theirs[number].lora_B["default"].weight.copy_(ours[number].lora_b)
    x = torch.randn(7, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(nn.functional.linear(x, merged(ours[0]), ours[0].bias), ours[0](x), rtol=1e-5, atol=1e-6)


def test_a_run_with_adapters_leaves_a_merged_model_and_the_adapter_beside_it(tmp_path: Path) -> None:
    init = model_folder(tmp_path / "init")
    recipe = recipe_for("engine.lora={rank: 4, alpha: 8.0}", "stages.sft.steps=4", "stages.sft.optim.rate=0.02")
    train(recipe, init, tmp_path / "out", lambda *_: Rows(("t", "t")))
    before, after = (load_file(folder / "model.safetensors") for folder in (init, tmp_path / "out" / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("backbone.layers" in name and name.endswith("proj.weight") for name in moved)
    config = json.loads((tmp_path / "out" / "adapters" / "sft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (4, 8.0, 14)
    again = load_model(init)
    load_adapter(again, tmp_path / "out" / "adapters" / "sft")
    for name, weight in again.state_dict().items():
        torch.testing.assert_close(weight, after[name], rtol=1e-5, atol=1e-6)
