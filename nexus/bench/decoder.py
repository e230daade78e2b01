"""The voice's step against MusicGen's decoder of transformers: same sizes, same weights, greedy, one thread.

MusicGen runs with its key-value cache, guidance 1, no cross attention and no codec, at whichever of its number types
and attention implementations is fastest here. Both sides feed their own choices back. Beside them runs the bare
sequence of the step's own products, on inputs that are there already (with the GELU or the sum that oneDNN makes in the
same call): the part of a step that could not be saved.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import MusicgenForCausalLM
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

from nexus.bench.race import Say, Settings, agreement, best, describe, race, ratio, side, threads, verdict
from nexus.model.voice.delayed import DelayedVoice
from nexus.model.voice.speaking import Speaking, VoiceState
from nexus.organs import VoiceConfig
from nexus.types import LETTERS

Form = Literal["float32", "bfloat16", "int8"]
SHARE_BAR = 0.7  # the bare products' part of our step


@dataclass(frozen=True)
class Heat:
    """One race: sizes, rows, and the bar of each form of our weights."""

    width: int
    heads: int
    rows: int
    bars: dict[Form, float]
    layers: int = 6
    books: int = 8
    book_size: int = 1000
    frames: int = 64  # three seconds at 21.5 a second
    repeats: int = 9


FULL = (
    Heat(256, 4, 1, {"float32": 1.3}, repeats=25),
    Heat(1024, 16, 1, {"float32": 1.05, "bfloat16": 1.3, "int8": 2.5}),
    Heat(1024, 16, 8, {"bfloat16": 2.0}),
)
TINY = (Heat(32, 2, 2, {"float32": 0.0, "bfloat16": 0.0, "int8": 0.0}, 1, 2, 14, 4, 2),)
# Root mean square of the difference of scores, relative to their size, over 12 steps of given codes.
BOUNDS: dict[Form, float] = {"float32": 1e-4, "bfloat16": 0.03, "int8": 0.03}


def peer_of(heat: Heat) -> MusicgenForCausalLM:
    """A MusicGen decoder of these sizes with random weights. Its last two codes stand for our PAD and EOS."""
    torch.manual_seed(0)
    config = MusicgenDecoderConfig(
        vocab_size=heat.book_size + 2,
        hidden_size=heat.width,
        num_hidden_layers=heat.layers,
        num_attention_heads=heat.heads,
        ffn_dim=4 * heat.width,
        num_codebooks=heat.books,
        activation_function="gelu",
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=heat.book_size,
        bos_token_id=heat.book_size,
    )
    return MusicgenForCausalLM(config).eval()


@torch.no_grad()
def as_voice(peer: MusicgenForCausalLM) -> DelayedVoice:
    """Our decoder with MusicGen's settings and the weights of `peer`."""
    theirs, decoder = peer.config, peer.model.decoder
    config = VoiceConfig(
        width=theirs.hidden_size,
        layers=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        ffn_width=theirs.ffn_dim,
        books=theirs.num_codebooks,
        book_size=theirs.vocab_size - 2,
        norm="layer",
        feed_forward="gelu",
        positions="sinusoidal",
        fusion="codes",
    )
    voice = DelayedVoice(config, language_width=1).eval()
    tables = torch.stack([table.get_parameter("weight") for table in decoder.embed_tokens])  # [K, C2 + 1, W]
    voice.codes.weight.copy_(tables[:, : theirs.vocab_size].flatten(0, 1))
    voice.start_vector.copy_(tables[:, theirs.pad_token_id].mean(0))  # it begins with one column of PAD
    voice.heads.weight.copy_(torch.cat([head.get_parameter("weight") for head in peer.lm_heads]))
    voice.norm.load_state_dict(decoder.layer_norm.state_dict())
    for mine, block in zip(voice.blocks, decoder.layers, strict=True):
        parts = {
            "attention_norm": block.self_attn_layer_norm,
            "query": block.self_attn.q_proj,
            "key": block.self_attn.k_proj,
            "value": block.self_attn.v_proj,
            "out": block.self_attn.out_proj,
            "ffn_norm": block.final_layer_norm,
            "up": block.fc1,
            "down": block.fc2,
        }
        mine.load_state_dict(
            {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
        )
    return voice


def bench(heats: tuple[Heat, ...], say: Say) -> dict[str, Any]:
    """All races on one thread; the result as JSON."""
    cases: list[Settings] = []
    with threads(1), torch.no_grad():
        for heat in heats:
            cases += _heat(heat, say)
    return {"cases": cases, "passed": all(case["passed"] for case in cases)}


def _heat(heat: Heat, say: Say) -> list[Settings]:
    name = f"width {heat.width}, batch {heat.rows}"
    say(f"decoder, {name}: MusicGen's settings, {heat.frames} frames")
    peer = peer_of(heat)
    half = copy.deepcopy(peer).bfloat16()
    plain = as_voice(peer)
    makers: dict[Form, Callable[[], Speaking]] = {
        "float32": lambda: plain,
        "bfloat16": lambda: copy.deepcopy(plain).bfloat16(),
        "int8": plain.quantised,
    }
    voices = {form: makers[form]() for form in heat.bars}
    agreed = {form: _agreement(peer, voice, heat, BOUNDS[form]) for form, voice in voices.items()}
    runs: list[tuple[Settings, Callable[[], object]]] = []
    for model, dtype in ((peer, "float32"), (half, "bfloat16")):
        for attention in ("sdpa", "eager"):
            runs.append(({"dtype": dtype, "attention": attention, "threads": 1}, _peer_run(model, attention, heat)))
    with torch.inference_mode():
        chosen, grid = best(runs, say)
    sides: dict[str, Callable[[], object]] = {"peer": runs[chosen][1]}
    for form, voice in voices.items():
        sides[form] = _our_run(voice, heat)
        sides[f"{form} products"] = _products(voice, heat)
    with torch.inference_mode():
        taken = race(sides, heat.repeats)
    cases = []
    for form, bar in heat.bars.items():
        share = statistics.median(taken[f"{form} products"]) / statistics.median(taken[form])
        case = {"case": f"{name}, {form}", **ratio(taken[form], taken["peer"], bar)}
        case["frames_per_second"] = heat.rows * heat.frames / statistics.median(taken[form])
        case["ours"] = side({"weights": form, "threads": 1}, taken[form])
        case["peer"] = {**side(runs[chosen][0], taken["peer"]), "grid": grid}
        case["agreement"] = agreed[form]
        case["products"] = {"seconds": taken[f"{form} products"], "share_of_step": share, "bar": SHARE_BAR}
        enough = share >= (SHARE_BAR if bar else 0.0)
        case["passed"] = case["passed"] and enough and case["agreement"]["agrees"]
        cases.append(case)
        say(f"{verdict(case)}; products are {share:.0%} of the step; peer: {describe(runs[chosen][0])}")
    return cases


def _start(voice: Speaking, rows: int, frames: int) -> VoiceState:
    """Rows that will not end for that many frames."""
    tokens = frames // LETTERS + 1
    state, nothing = voice.start(rows), torch.zeros(tokens, 1)
    for row in range(rows):
        voice.hear(state, row, nothing, nothing, torch.ones(tokens, LETTERS, dtype=torch.long))
    return state


def _our_run(voice: Speaking, heat: Heat) -> Callable[[], Tensor]:
    rows = list(range(heat.rows))

    def run() -> Tensor:
        state = _start(voice, heat.rows, heat.frames)
        for _ in range(heat.frames):
            column = voice.step(state, rows)
        return column

    return run


def _products(voice: Speaking, heat: Heat) -> Callable[[], None]:
    calls = voice.speech().decoder.products(heat.rows)

    def run() -> None:
        for _ in range(heat.frames):
            for call in calls:
                call()

    return run


def _peer_run(peer: MusicgenForCausalLM, attention: str, heat: Heat) -> Callable[[], Tensor]:
    def run() -> Tensor:
        peer.set_attn_implementation(attention)
        column, past = torch.full((heat.rows * heat.books, 1), heat.book_size), None
        for _ in range(heat.frames):
            said = peer(input_ids=column, past_key_values=past, use_cache=True)
            column, past = said.logits[:, -1:].argmax(-1), said.past_key_values
        return column

    return run


def _agreement(peer: MusicgenForCausalLM, voice: Speaking, heat: Heat, bound: float) -> Settings:
    """Scores of the same columns, step by step on our side, whole on MusicGen's (in float32)."""
    steps = min(12, heat.frames)
    columns = torch.randint(heat.book_size, (heat.rows, heat.books, steps))
    for book in range(heat.books):
        columns[:, book, :book] = heat.book_size  # PAD until a book starts
    expected = _whole(peer, columns)
    state, rows = _start(voice, heat.rows, heat.frames), list(range(heat.rows))
    mine = []
    for step in range(steps):
        mine.append(voice.scores(state, rows))
        voice.take(state, rows, columns[:, :, step])
    return agreement(torch.stack(mine, 1)[..., : heat.book_size], expected[..., : heat.book_size], bound)


def _whole(peer: MusicgenForCausalLM, columns: Tensor) -> Tensor:
    """MusicGen's scores [B, S, K, C2] of every step of the given columns [B, K, S]; it is shown the one before."""
    rows, books, _ = columns.shape
    shown = nn.functional.pad(columns[:, :, :-1], (1, 0), value=peer.config.pad_token_id)
    return peer(input_ids=shown.flatten(0, 1)).logits.unflatten(0, (rows, books)).transpose(1, 2)
