"""Any combination of organs, by recipe alone: each trains a step, speaks, is saved, loaded, and speaks the same."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import spelled, tiny_film, tiny_picture, tiny_recipe, tiny_sound, tiny_tokenizer
from torch import Tensor, nn

from nexus.codec import StreamDecoder
from nexus.codec.rvq import RVQCodec
from nexus.data.chat import render
from nexus.data.collate import collate
from nexus.errors import BadConfig, BadRecord, Misaligned, NexusError
from nexus.model.folder import load_model, save_model, write_config
from nexus.model.omni import OmniModel
from nexus.organs import ModelConfig
from nexus.respond import OmniResponder, load
from nexus.types import Audio, Part, Script, SpeechBatch, Text, Turn


class DepthwiseEars(nn.Module):
    """An encoder from outside: no Whisper, no transformer; `stride` mel frames become one state."""

    def __init__(self, num_mels: int, width: int, stride: int = 5) -> None:
        super().__init__()
        self.stride = stride
        self.mix = nn.Conv1d(num_mels, width, 1)
        self.down = nn.Conv1d(width, width, stride, stride=stride, groups=width)

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        mel = nn.functional.pad(mel, (0, -mel.shape[2] % self.stride))
        valid = torch.arange(mel.shape[2]) < lengths[:, None]
        return self.down(self.mix(mel) * valid[:, None]).transpose(1, 2)

    @staticmethod
    def frames_for(mel_frames: int, stride: int = 5) -> int:
        return -(-mel_frames // stride)


class Broader(DepthwiseEars):
    """Gives wider states than the recipe says."""

    def __init__(self, num_mels: int, width: int) -> None:
        super().__init__(num_mels, width + 1)


class Sparser(DepthwiseEars):
    """Gives fewer states than it promises."""

    @staticmethod
    def frames_for(mel_frames: int, stride: int = 5) -> int:
        return mel_frames


class Countless(DepthwiseEars):
    """Promises no whole number of states."""

    @staticmethod
    def frames_for(mel_frames: int, stride: int = 5) -> int:
        return mel_frames / stride  # type: ignore[return-value]


class Buzz:
    """A vocoder elsewhere: 960 samples a code, one frame late."""

    def __init__(self) -> None:
        self.held = torch.zeros(0)

    def push(self, codes: Tensor) -> Tensor:
        wave = torch.cat([self.held, (codes[0] / 6561).repeat_interleave(960)])
        wave, self.held = wave[:-960], wave[-960:]
        return wave

    def flush(self) -> Tensor:
        wave, self.held = self.held, torch.zeros(0)
        return wave


def section(organ: str, **fields: Any) -> str:
    return f"model.{organ}={json.dumps(fields)}"


def voice(books: int, book_size: int, **changes: Any) -> str:
    fields = dict(width=16, layers=2, heads=2, ffn_width=24, books=books, book_size=book_size, max_seconds=1.0)
    return section("voice", **fields, **changes)


def rvq(rate_hz: int, hop: int, stack: int, books: int, book_size: int) -> str:
    fields = dict(rate_hz=rate_hz, num_fft=4 * hop, hop=hop, stack=stack, books=books, book_size=book_size)
    return section("codec", **fields, num_mels=20, pca_dims=8, vocoder_width=16, vocoder_blocks=1)


def firefly(books: int, levels: Sequence[int], rate_hz: int = 8000) -> str:
    sizes = dict(num_fft=256, hop=64, num_mels=16, depths=[1, 1], widths=[16, 32], downsample=[2, 2])
    head = dict(upsample_rates=[8, 8], upsample_kernels=[16, 16], upsample_width=16)
    kernels = dict(residual_kernels=[3], residual_dilations=[1, 3])
    return section("codec", type="firefly", rate_hz=rate_hz, books=books, levels=levels, **sizes, **head, **kernels)


def ears(**encoder: Any) -> str:
    adapter = dict(stack=5, width=24)
    return section("hearing", encoder=dict(num_mels=40, width=16, **encoder), adapter=adapter, max_seconds=20.0)


def whisper(**changes: Any) -> str:
    return ears(layers=2, heads=2, ffn_width=24, window_seconds=3.0, **changes)


def outside(name: str = "DepthwiseEars", **changes: Any) -> str:
    return ears(type=f"{__name__}:{name}", window_seconds=3.0, **changes)


PLAIN = dict(vocab_size=400, width=32, layers=2, heads=2, kv_heads=1, ffn_width=48, max_positions=1024)
QWEN2, QWEN2_TIED = section("language", type="qwen2", **PLAIN), section("language", type="qwen2", tied=True, **PLAIN)
VL_TIED = section("language", type="qwen2_5_vl", mrope_section=[2, 3, 3], rope_theta=1e4, tied=True, **PLAIN)
INTERNVIT_SIZES = dict(width=16, layers=2, heads=2, ffn_width=24, side=56, projector_width=24)
INTERNVIT = section("vision", type="internvit", **INTERNVIT_SIZES)
BLIND, DEAF = "model.vision=null", "model.hearing=null"
MUTE = ("model.voice=null", "model.codec=null")
SINUSOIDAL = whisper(positions="sinusoidal", conv_strides=[1, 2])
PADDED = whisper(positions="sinusoidal", pad_to_window=True)
COSYVOICE = section("codec", type="cosyvoice2")
MUSICGEN = dict(norm="layer", feed_forward="gelu", positions="sinusoidal", fusion="sum")

COMBINATIONS: dict[str, tuple[str, ...]] = {
    "the tiny system": (),
    "tied head, sinusoidal ears, half fusion, held states": (
        VL_TIED,
        SINUSOIDAL,
        voice(8, 16, fusion="half", conditioning="hold"),
    ),
    "qwen2 with qwen's eyes, padded ears, four books": (QWEN2, PADDED, voice(4, 12), rvq(8000, 128, 2, 4, 12)),
    "qwen2 with internvit, outside ears, one book": (
        QWEN2,
        INTERNVIT,
        outside(),
        voice(1, 30),
        rvq(22_050, 256, 4, 1, 30),
    ),
    "qwen2 tied, blind, with cosyvoice's tokens": (QWEN2_TIED, BLIND, voice(1, 6561), COSYVOICE),
    "internvit with m-rope, ears of another rate": (INTERNVIT, outside(settings={"stride": 8})),
    "internvit, deaf, firefly": (INTERNVIT, DEAF, voice(8, 12), firefly(8, [3, 4])),
    "firefly of four books, tied head": (VL_TIED, voice(4, 27, conditioning="last"), firefly(4, [3, 3, 3], 16_000)),
    "musicgen's decoder": (voice(4, 12, **MUSICGEN), rvq(16_000, 160, 5, 4, 12)),
    "musicgen's decoder, codes alone, no picture": (BLIND, voice(8, 16, **{**MUSICGEN, "fusion": "codes"})),
    "layer norm, state alone, the state before": (voice(8, 16, norm="layer", source="state", states="pre"),),
    "two books, last state held, sum": (
        voice(2, 10, conditioning="last", fusion="sum", positions="sinusoidal"),
        rvq(24_000, 240, 4, 2, 10),
    ),
    "typed questions, spoken answers": (QWEN2, BLIND, DEAF),
    "cosyvoice's tokens with firefly's neighbours": (INTERNVIT, PADDED, voice(1, 6561, **MUSICGEN), COSYVOICE),
    "text out alone, all media in": (INTERNVIT, outside(), *MUTE),
    "text alone": (QWEN2_TIED, BLIND, DEAF, *MUTE),
    "fused attention everywhere": (
        section("language", attention="sdpa", mrope_section=[2, 3, 3], **PLAIN),
        section("vision", type="internvit", attention="sdpa", **INTERNVIT_SIZES),
    ),
}
TOKENIZER = tiny_tokenizer()


def parts(config: ModelConfig) -> tuple[Part, ...]:
    """A question in everything the model takes."""
    seen = (tiny_picture(60, 90), tiny_film(3)) if config.vision else ()
    heard = (tiny_sound(1.3),) if config.hearing else ()
    return (*seen, *heard, Text("what is two"))


def losses(model: OmniModel) -> dict[str, Tensor]:
    """Losses of all that can be trained: answers, speech, and a codec's own."""
    config, codec = model.config, model.codec
    turns = (Turn("user", parts(config)), Turn("assistant", (Text("red circle"),)))
    given = model(collate([render(turns, TOKENIZER, config)], TOKENIZER.pad, config))
    if config.voice is not None:
        draw = torch.Generator().manual_seed(1)
        states, embeds = torch.randn(2, 1, 3, config.language.width, generator=draw)
        script = Script(states, embeds, spelled(torch.tensor([[3, 2, 4]])), torch.tensor([3]))
        codes = torch.randint(config.voice.book_size, (1, config.voice.books, 20), generator=draw)
        given |= {"speech": model(SpeechBatch(script, codes, torch.tensor([20])))["speech"]}
    if isinstance(codec, RVQCodec):
        wave = 0.3 * torch.sin(torch.arange(codec.rate_hz)[None] * 0.3)
        given["codec"] = codec.vocoder_loss(wave, torch.Generator().manual_seed(1))
    return given


def silent_by_choice(config: ModelConfig) -> set[str]:
    """Parameters that the settings leave without a part in the loss."""
    silent: set[str] = set()
    if config.voice and config.voice.conditioning != "clock":
        silent.add("voice.silence")
    if config.voice and config.voice.fusion == "codes":
        silent |= {"voice.silence", "voice.state.", "voice.state_norm.", "voice.embed.", "voice.embed_norm."}
    return silent


def train_a_step(model: OmniModel) -> None:
    """One step on everything trainable; it must reach every organ and lower the loss."""
    trained = {n: p for n, p in model.named_parameters() if isinstance(model.codec, RVQCodec) or "codec." not in n}
    before = losses(model.train())
    assert before and all(bool(loss.isfinite()) for loss in before.values())
    torch.stack(list(before.values())).sum().backward()
    without = [n for n, p in trained.items() if p.grad is None or not bool(p.grad.any())]
    choice = tuple(silent_by_choice(model.config))
    assert [n for n in without if not n.startswith(choice or ("none",))] == []
    assert all(bool(p.grad.isfinite().all()) for p in trained.values() if p.grad is not None)
    torch.optim.AdamW(trained.values(), lr=1e-3).step()
    after = losses(model.eval())
    assert all(float(after[name].detach()) < float(loss.detach()) for name, loss in before.items())


Answers = list[tuple[str, np.ndarray]]


def answers(responder: OmniResponder) -> Answers:
    """Text and sound of an answer to everything at once and, with a voice, of words read aloud."""
    config = responder.model.config
    talks = [(Turn("user", parts(config)),)]
    if config.voice is not None:
        talks.append((Turn("user", (Text("two red", aloud=True),)),))
    said: Answers = []
    for talk in talks:
        deltas = list(responder.respond(talk, speak=config.voice is not None, max_tokens=4))
        sound = [delta.pcm for delta in deltas if delta.pcm is not None]
        said.append(("".join(delta.text for delta in deltas), np.concatenate([np.zeros(0, np.float32), *sound])))
    return said


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_learns_speaks_and_speaks_the_same_from_its_folder(name: str, tmp_path: Path) -> None:
    config = tiny_recipe(*COMBINATIONS[name]).model
    vocoder: Callable[[], StreamDecoder] | None = Buzz if config.codec and config.codec.type == "cosyvoice2" else None
    model = OmniModel(config)
    train_a_step(model)
    here = answers(OmniResponder(model, TOKENIZER, vocoder))
    if config.codec is not None:
        text, aloud = here[-1]
        assert text == "" and len(aloud) > 0 and len(aloud) % config.codec.samples_per_frame == 0
        assert bool(np.isfinite(aloud).all()) and float(np.abs(aloud).max()) > 0
    save_model(tmp_path / "model", model, {})
    TOKENIZER.save(tmp_path / "model" / "tokenizer.json")
    loaded = load(tmp_path / "model", vocoder=vocoder)
    assert loaded.model.config == config
    for (text, sound), (text_there, sound_there) in zip(here, answers(loaded), strict=True):
        assert text == text_there and np.array_equal(sound, sound_there)


def test_the_combinations_differ_in_every_organ() -> None:
    configs = [tiny_recipe(*overrides).model for overrides in COMBINATIONS.values()]
    assert len(configs) >= 12 and len({config.model_dump_json() for config in configs}) == len(configs)
    assert {(c.language.type, c.language.tied) for c in configs} >= {
        ("qwen2_5_vl", False),
        ("qwen2_5_vl", True),
        ("qwen2", False),
        ("qwen2", True),
    }
    assert {c.vision and c.vision.type for c in configs} == {"qwen2_5_vl", "internvit", None}
    assert len({c.hearing and c.hearing.encoder.type for c in configs}) == 3
    assert len({c.codec.frame_rate_hz for c in configs if c.codec}) >= 6
    assert {c.voice.books for c in configs if c.voice} == {1, 2, 4, 8}


def test_a_model_without_a_voice_does_not_speak_and_one_without_eyes_does_not_see() -> None:
    for name, part in (("text alone", Text("two")), ("typed questions, spoken answers", tiny_picture())):
        model = OmniModel(tiny_recipe(*COMBINATIONS[name]).model).eval()
        with pytest.raises(BadRecord, match=r"this model has no (voice|vision)"):
            list(OmniResponder(model, TOKENIZER).respond([Turn("user", (part,))]))


def test_tokens_whose_vocoder_is_elsewhere_are_not_spoken_without_it() -> None:
    model = OmniModel(tiny_recipe(voice(1, 6561), COSYVOICE).model).eval()
    with pytest.raises(NexusError, match="give a vocoder") as caught:
        list(OmniResponder(model, TOKENIZER).respond([Turn("user", (Text("two"),))]))
    assert "\n" not in str(caught.value)


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "other books": ((voice(4, 16),), "voice.books is 4 but codec.books is 8"),
    "other book size": ((voice(8, 17),), "voice.book_size is 17 but codec.book_size is 16"),
    "firefly's books": ((voice(8, 27), firefly(4, [3, 3, 3])), "voice.books is 8 but codec.books is 4"),
    "cosyvoice's book": ((voice(8, 6561), COSYVOICE), "voice.books is 8 but codec.books is 1"),
    "a voice without codec": (("model.codec=null",), "voice and codec come together"),
    "a codec without voice": (("model.voice=null",), "voice and codec come together"),
    "m-rope on qwen2": ((section("language", type="qwen2", mrope_section=[2, 3, 3], **PLAIN),), "not to qwen2"),
    "qwen2.5-vl without m-rope": ((section("language", **PLAIN),), "mrope_section belongs to type qwen2_5_vl"),
    "m-rope of another width": (
        (section("language", mrope_section=[2, 3, 4], **PLAIN),),
        r"mrope_section \[2, 3, 4\] must sum to half the head width, 8",
    ),
    "another model's eyes": ((section("vision", type="siglip"),), "vision.type: expected one of .*'siglip'"),
    "a square that is no multiple": (
        (section("vision", type="internvit", **{**INTERNVIT_SIZES, "side": 70}),),
        "side 70 must be a multiple of patch x shuffle = 28",
    ),
    "qwen's field on internvit": (
        (section("vision", type="internvit", window=56, **INTERNVIT_SIZES),),
        r"unknown key 'model.vision.window'",
    ),
    "outside class missing": ((outside("Nobody"),), "test_combinations:Nobody is no torch.nn.Module class"),
    "outside class no module": ((outside("Buzz"),), "test_combinations:Buzz is no torch.nn.Module class"),
    "outside module missing": (
        (ears(type="no_such_package:Ears"),),
        "'no_such_package' cannot be imported .* install the package that holds Ears",
    ),
    "outside settings": ((outside(settings={"strides": 2}),), "frames_for fails with settings {'strides': 2}"),
    "outside counting": ((outside("Countless"),), "frames_for must give a positive int, given 2.0"),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_in_the_recipe(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadConfig, match=message) as caught:
        tiny_recipe(*overrides)
    assert "\n" not in str(caught.value)


CHANGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "books": (lambda m: m["voice"].update(books=4), "voice.books is 4 but codec.books is 8"),
    "language": (lambda m: m["language"].update(type="qwen2"), "not to qwen2"),
    "encoder": (lambda m: m["hearing"]["encoder"].update(type="no_such_package:Ears"), "hearing.encoder"),
    "vision": (lambda m: m["vision"].update(type="internvit"), "vision"),
    "codec": (lambda m: m["codec"].update(type="firefly"), "codec"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED.keys())
def test_a_folder_whose_parts_do_not_fit_is_refused_before_its_weights_are_looked_for(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    write_config(tmp_path, tiny_recipe().model, {})
    tree = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    change(tree["model"])
    (tmp_path / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(BadConfig, match=message) as caught:
        load_model(tmp_path)  # there are no weights: had it looked, it would say so
    assert "\n" not in str(caught.value) and "safetensors" not in str(caught.value)


@pytest.mark.parametrize(("name", "said"), [("Broader", "of width 16"), ("Sparser", "100 of width 16")])
def test_an_outside_encoder_that_breaks_its_promise_is_stopped_at_its_first_sound(name: str, said: str) -> None:
    config = tiny_recipe(outside(name), BLIND).model
    model, sound = OmniModel(config).eval(), Audio(samples=np.zeros(16_000, np.float32), rate_hz=16_000)
    row = render((Turn("user", (sound,)),), TOKENIZER, config, answer=True)
    with pytest.raises(Misaligned, match=said) as caught:
        model.hidden(collate([row], TOKENIZER.pad, config))
    assert "\n" not in str(caught.value)
