"""LoRA adapters in PEFT layout: merged here and wrapped by peft they give the same model; the rest is refused."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_picture, tiny_recipe, tiny_sound, tiny_tokenizer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model

from nexus.data.chat import render
from nexus.data.collate import collate
from nexus.errors import BadCheckpoint
from nexus.model.adapters import load_adapter, save_adapter
from nexus.model.omni import OmniModel
from nexus.organs import VisionConfig
from nexus.types import Batch, Part, Text, Turn

LANGUAGE = tiny_recipe().model.language
SIZES: dict[str, Any] = {
    "vocab_size": LANGUAGE.vocab_size, "hidden_size": LANGUAGE.width, "intermediate_size": LANGUAGE.ffn_width,
    "num_hidden_layers": LANGUAGE.layers, "num_attention_heads": LANGUAGE.heads, "rms_norm_eps": LANGUAGE.norm_eps,
    "num_key_value_heads": LANGUAGE.kv_heads, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": LANGUAGE.rope_theta}
QWEN2 = (
    "model.language={type: qwen2, vocab_size: 400, width: 32, layers: 2, heads: 2, kv_heads: 1, ffn_width: 64,"
    " rope_theta: 10000.0, max_positions: 1024}"
)
Q_PROJ = "language.backbone.layers.0.self_attn.q_proj"


def published_twin(model: OmniModel) -> Any:
    """transformers' own model with the weights of ours."""
    eager: dict[str, Any] = {"attn_implementation": "eager"}
    backbone, head = model.language.backbone, model.language.head
    assert head is not None
    if model.config.language.type == "qwen2":
        plain = Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=ROPE, **eager))
        plain.model.load_state_dict(backbone.state_dict())
        plain.lm_head.load_state_dict(head.state_dict())
        return plain.eval()
    tower, seen = model.get_submodule("vision.tower"), tiny_recipe().model.vision
    assert isinstance(seen, VisionConfig)
    ids = tiny_tokenizer().ids
    config = Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_parameters": {**ROPE, "mrope_section": list(LANGUAGE.mrope_section or ())}},
        vision_config={
            "depth": seen.layers, "hidden_size": seen.width, "num_heads": seen.heads, "window_size": seen.window,
            "intermediate_size": seen.ffn_width, "fullatt_block_indexes": list(seen.full_attention_layers),
            "tokens_per_second": 2, "out_hidden_size": LANGUAGE.width,
        },
        image_token_id=ids["<|image_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        **eager,
    )  # fmt: skip
    twin = Qwen2_5_VLForConditionalGeneration(config)
    twin.model.language_model.load_state_dict(backbone.state_dict())
    twin.lm_head.load_state_dict(head.state_dict())
    twin.model.visual.load_state_dict(tower.state_dict())
    return twin.eval()


def adapted(twin: Any, seed: int = 0, **options: Any) -> Any:
    """The twin under a peft adapter of random weights, large enough to change every answer."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    wrapped = get_peft_model(copy.deepcopy(twin), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return wrapped.eval()


def talk(model: OmniModel, picture: bool) -> Batch:
    words = Text("how many red circle please")
    parts: tuple[Part, ...] = (tiny_picture(), words) if picture else (words,)
    return collate([render([Turn("user", parts)], tiny_tokenizer(), model.config)], tiny_tokenizer().pad, model.config)


def our_logits(model: OmniModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.language.logits(model.hidden(batch))


def their_logits(twin: Any, batch: Batch) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": batch.tokens, "attention_mask": batch.mask.long()}
    if batch.sight is not None:
        pads = batch.tokens == tiny_tokenizer().ids["<|image_pad|>"]
        inputs |= {"pixel_values": batch.sight.rows, "image_grid_thw": batch.sight.grids}
        inputs["mm_token_type_ids"] = pads.int()
    with torch.no_grad():
        return twin(**inputs).logits


CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "language of Qwen2.5-VL": ((), {"task_type": "CAUSAL_LM"}),
    "language and vision of Qwen2.5-VL": ((), {"target_modules": ["q_proj", "up_proj", "qkv", "attn.proj"]}),
    "every linear layer but the head": ((), {"target_modules": "all-linear"}),
    "some layers": ((), {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "rank-stabilised": ((), {"use_rslora": True}),
    "Qwen2.5": ((QWEN2,), {"task_type": "CAUSAL_LM", "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize(("overrides", "options"), CASES.values(), ids=CASES.keys())
def test_a_merged_adapter_gives_the_logits_of_peft(
    tmp_path: Path, overrides: tuple[str, ...], options: dict[str, Any]
) -> None:
    model = tiny_model(0, *overrides)
    batch = talk(model, picture=not overrides)
    twin = published_twin(model)
    before = our_logits(model, batch)
    assert_close(before, their_logits(twin, batch), atol=1e-5, rtol=0)
    wrapped = adapted(twin, **options)
    wrapped.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    wanted = their_logits(wrapped, batch)
    assert float((wanted - before).abs().max()) > 1e-2
    assert_close(our_logits(model, batch), wanted, atol=1e-5, rtol=0)


def test_names_of_older_transformers_lead_to_the_same_layers(tmp_path: Path) -> None:
    wrapped = adapted(published_twin(tiny_model()), target_modules=["q_proj", "qkv"])
    new, old = tmp_path / "new", tmp_path / "old"
    for folder in (new, old):
        wrapped.save_pretrained(folder)
    change(old, lambda weights: renamed(weights, "model.language_model.", "model."))
    change(old, lambda weights: renamed(weights, "model.visual.", "visual."))
    models = [tiny_model(), tiny_model()]
    for model, folder in zip(models, (new, old), strict=True):
        load_adapter(model, folder)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name
    assert not torch.equal(models[0].state_dict()[f"{Q_PROJ}.weight"], tiny_model().state_dict()[f"{Q_PROJ}.weight"])


def test_an_adapter_of_our_own_modules_is_read_by_peft_and_by_us_alike(tmp_path: Path) -> None:
    model = tiny_model()
    names = (
        Q_PROJ,
        "language.head",
        "hearing.encoder.layers.1.query",
        "hearing.adapter.second",
        "vision.tower.merger.mlp.0",
    )
    save_adapter(tmp_path, random_pairs(model, names), 7.5, rank_stabilised=True, base="somebody/some-model")
    organs: Any = nn.ModuleDict(dict(tiny_model().named_children()))  # peft merges where `config` is none of ours
    their = PeftModel.from_pretrained(organs, str(tmp_path)).merge_and_unload()
    load_adapter(model, tmp_path)
    fresh, wanted = tiny_model().state_dict(), their.state_dict()
    for name, tensor in model.state_dict().items():
        assert_close(tensor, wanted[name], atol=1e-6, rtol=0)
        assert torch.equal(tensor, fresh[name]) == (name.removesuffix(".weight") not in names)


def test_an_adapter_of_hearing_changes_what_is_heard(tmp_path: Path) -> None:
    model = tiny_model()
    row = render([Turn("user", (tiny_sound(),))], tiny_tokenizer(), model.config)
    batch = collate([row], tiny_tokenizer().pad, model.config)
    before = our_logits(model, batch)
    save_adapter(tmp_path, random_pairs(model, ["hearing.adapter.first"]), 4)
    load_adapter(model, tmp_path)
    assert float((our_logits(model, batch) - before).abs().max()) > 1e-3


def test_weights_of_sixteen_bits_are_changed_by_sums_of_thirty_two(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    weight = model.get_submodule(Q_PROJ).weight
    assert isinstance(weight, Tensor)
    ((a, b),) = random_pairs(tiny_model(), [Q_PROJ]).values()
    wanted = (weight.double() + 2 * (b.double() @ a.double())).to(torch.bfloat16)
    save_adapter(tmp_path, {Q_PROJ: (a, b)}, 8)
    load_adapter(model, tmp_path)
    assert weight.dtype == torch.bfloat16
    assert float((weight != wanted).float().mean()) < 0.01  # a sum beside the middle of two numbers may round elsewhere


REFUSED: dict[str, dict[str, Any]] = {
    "peft_type is 'LOHA'": {"peft_type": "LOHA"},
    "use_dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 8}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 8}},
    "layer_replication": {"layer_replication": [[0, 2]]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "target_parameters": {"target_parameters": ["experts"]},
    "lora_bias": {"lora_bias": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "init_lora_weights is \"pissa\"": {"init_lora_weights": "pissa"},
    "an_option_of_tomorrow": {"an_option_of_tomorrow": {"on": 1}},
    "r is 0": {"r": 0},
    "r is None": {"r": None},
    "r is True": {"r": True},
    "lora_alpha is nan": {"lora_alpha": float("nan")},
    "lora_alpha is 1000": {"lora_alpha": 10**400},
    "lora_alpha is 'much'": {"lora_alpha": "much"},
    "use_rslora is 1": {"use_rslora": 1},
}  # fmt: skip


@pytest.mark.parametrize(("named", "changes"), REFUSED.items(), ids=REFUSED.keys())
def test_an_option_that_cannot_be_kept_is_refused_by_name(tmp_path: Path, named: str, changes: dict[str, Any]) -> None:
    folder = good_adapter(tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert named in refusal(folder)


def test_everything_peft_writes_by_itself_is_understood(tmp_path: Path) -> None:
    adapted(published_twin(tiny_model()), task_type="CAUSAL_LM", lora_dropout=0.1).save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())) > 20
    load_adapter(tiny_model(), tmp_path)


def test_a_dora_adapter_of_peft_is_refused(tmp_path: Path) -> None:
    adapted(published_twin(tiny_model()), use_dora=True).save_pretrained(tmp_path)
    assert "use_dora is true" in refusal(tmp_path)


def test_full_weights_beside_the_adapter_are_refused(tmp_path: Path) -> None:
    wrapped = adapted(published_twin(tiny_model()), target_modules=["q_proj", "embed_tokens"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells that it saves the table as well
        wrapped.save_pretrained(tmp_path)
    assert "embed_tokens" in refusal(tmp_path)


Weights = dict[str, Tensor]
FIRST = f"base_model.model.{Q_PROJ}"
HALF, OTHER = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
UNKNOWN = "base_model.model.model.layers.9.mlp.up_proj"
NORM = "base_model.model.model.norm"
OLD_NAME = "base_model.model.model.layers.0.self_attn.q_proj"


def renamed(weights: Weights, old: str, new: str) -> Weights:
    return {key.replace(old, new): tensor.clone() for key, tensor in weights.items()}


def change(folder: Path, how: Callable[[Weights], Weights]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(how(load_file(path)), path, {"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a half is missing": (lambda w: {HALF: w[HALF]}, "q_proj.lora_A.weight without"),
    "a stray tensor": (lambda w: {**w, "stray": torch.zeros(1)}, "holds stray"),
    "a layer we lack": (lambda w: renamed(w, FIRST, UNKNOWN), "layers.9.mlp.up_proj, expected a linear layer"),
    "a layer that is not linear": (lambda w: renamed(w, FIRST, NORM), "found a RMSNorm"),
    "two names of one layer": (lambda w: w | renamed(w, FIRST, OLD_NAME), "two weights"),
    "another width": (lambda w: {**w, HALF: torch.zeros(4, 31)}, "shape [4, 31]"),
    "another rank": (lambda w: {**w, OTHER: torch.zeros(32, 5)}, "shape [32, 5]"),
    "not finite": (lambda w: {**w, HALF: torch.full((4, 32), float("nan"))}, "NaN"),
    "whole numbers": (lambda w: {**w, HALF: torch.zeros(4, 32, dtype=torch.int8)}, "int8"),
    "far too large": (lambda w: {HALF: w[HALF] * 1e25, OTHER: w[OTHER] * 1e25}, "training diverged"),
    "nothing in it": (lambda w: {}, "holds no weights"),
}


@pytest.mark.parametrize(("how", "named"), DAMAGES.values(), ids=DAMAGES.keys())
def test_weights_that_do_not_fit_are_refused_and_nothing_is_merged(
    tmp_path: Path, how: Callable[[Weights], Weights], named: str
) -> None:
    folder = good_adapter(tmp_path)
    change(folder, how)
    assert named in refusal(folder)


def test_a_head_that_is_the_embedding_table_takes_no_adapter(tmp_path: Path) -> None:
    save_adapter(tmp_path, random_pairs(tiny_model(), ["language.head"]), 4)
    assert "language.head" in refusal(tmp_path, "model.language.tied=true")


def test_a_folder_without_readable_files_is_refused(tmp_path: Path) -> None:
    assert "no such adapter folder" in refusal(tmp_path / "none")
    folder = good_adapter(tmp_path)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "damaged" in refusal(folder)
    weights.unlink()
    assert "holds no adapter_model.safetensors" in refusal(folder)
    (folder / "adapter_model.bin").write_bytes(b"never read")
    assert "pickled adapter_model.bin" in refusal(folder)
    config.write_text("{")
    assert "is no JSON" in refusal(folder)
    config.write_text("[]")
    assert "peft_type" in refusal(folder)
    config.unlink()
    assert "holds no adapter_config.json" in refusal(folder)


def random_pairs(model: OmniModel, names: Any) -> dict[str, tuple[Tensor, Tensor]]:
    pairs = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        pairs[name] = (torch.randn(4, layer.in_features) * 0.3, torch.randn(layer.out_features, 4) * 0.3)
    return pairs


def good_adapter(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", random_pairs(tiny_model(), [Q_PROJ]), 8)
    return tmp_path / "adapter"


def refusal(folder: Path, *overrides: str) -> str:
    """The one line with which an adapter is refused, by a model that is left as it was."""
    model = tiny_model(0, *overrides)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BadCheckpoint) as caught:
        load_adapter(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)
