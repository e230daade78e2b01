"""The language model: a wrapper over the text classes of Qwen2.5-VL and Qwen2.5 in transformers.

It offers embeddings, M-RoPE positions, hidden states, logits and an explicit state for incremental decoding, and
knows nothing of sound, pictures or speech.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2RotaryEmbedding
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding, Qwen2_5_VLTextModel

from nexus.model.fused import attend, autocast_type, fuse_norms
from nexus.model.packing import packed
from nexus.organs import InternViTConfig, LanguageConfig, VisionConfig
from nexus.types import Span

FUSED = "nexus"  # the name under which transformers finds `attend`


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **unused: object
) -> tuple[Tensor, None]:
    """Attention as transformers' layers ask for it."""
    return attend(q, k, v, mask, scaling).transpose(1, 2), None


def _in_autocast_type(_module: nn.Module, _inputs: object, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines in the type of the queries and keys that they turn."""
    cosines, sines = turns
    return cosines.to(autocast_type(cosines)), sines.to(autocast_type(sines))


AttentionInterface.register(FUSED, _attend)
AttentionMaskInterface.register(FUSED, eager_mask)


@dataclass
class LanguageState:
    """What incremental decoding remembers: keys and values, which cached positions are real, the next position."""

    cache: DynamicCache
    mask: Bool[Tensor, "B T"]
    next_position: Int[Tensor, "B"]


def mrope_positions(
    mask: Bool[Tensor, "B T"], spans: Sequence[Span], vision: VisionConfig | InternViTConfig | None
) -> tuple[Int[Tensor, "3 B T"], Int[Tensor, "B"]]:
    """M-RoPE positions (time, height, width) and the next free position of each row (Qwen2.5-VL section 2.1).

    Text and sound count up by one on all three axes. A picture or film at position p takes p + (floor(time step x
    tokens per second x seconds per step), row, column) on the merged grid, and the text after it goes on at
    p + max(rows, columns). Masked positions (padding, left or right) hold zeros. Spans of a row must be in order.

    The next free position follows the last text position: a written token stands where training would have put it,
    and where transformers' `generate` puts it. (Its cached forward by hand goes on behind the greatest position, which
    after a long film is a later one.)
    """
    counts = mask.long()
    # What a vision span adds to the running count behind itself; one column more for a span that ends the row.
    jumps = nn.functional.pad(torch.zeros_like(counts), (0, 1))
    for span in spans:
        if span.grid is None:
            continue
        assert vision is not None
        extent = max(span.grid[1], span.grid[2]) // vision.merge
        jumps[span.row, span.start + span.length] += extent - span.length
    flat = (counts.cumsum(1) - 1 + jumps[:, :-1].cumsum(1)) * counts
    positions = flat.expand(3, -1, -1).clone()
    for span in spans:
        if span.grid is None or vision is None:
            continue
        steps, rows, columns = span.grid[0], span.grid[1] // vision.merge, span.grid[2] // vision.merge
        interval = vision.tokens_per_second * span.seconds_per_grid if span.kind == "video" else 1
        start = int(flat[span.row, span.start])
        time = (torch.arange(steps) * interval).long()
        grid = torch.stack(torch.meshgrid(time, torch.arange(rows), torch.arange(columns), indexing="ij")).flatten(1)
        positions[:, span.row, span.start : span.start + span.length] = (grid + start).to(positions.device)
    return positions, counts.sum(1) + jumps.sum(1)


class Language(nn.Module):
    """The organ: `backbone` and `head` are the published modules under their own names (no head where it is tied)."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.packing = False  # whether training lays rows end to end instead of padding them
        sizes: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": config.ffn_width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.norm_eps,
            "bos_token_id": None,
            "eos_token_id": None,
            "attn_implementation": FUSED if config.attention == "eager" else config.attention,
        }
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        self.backbone: Qwen2Model | Qwen2_5_VLTextModel
        rotary: Callable[[], nn.Module]
        match config.type:
            case "qwen2":
                plain = Qwen2Config(**sizes, rope_parameters=rope)
                self.backbone, rotary = Qwen2Model(plain), lambda: Qwen2RotaryEmbedding(plain)
            case "qwen2_5_vl":
                axes = {"mrope_section": list(config.mrope_section or ())}
                published: Any = Qwen2_5_VLTextConfig(**sizes, rope_parameters=rope | axes)
                self.backbone, rotary = Qwen2_5_VLTextModel(published), lambda: Qwen2_5_VLRotaryEmbedding(published)
        with torch.device("cpu"):  # its numbers are in no checkpoint: they are real also on the meta device
            self.backbone.rotary_emb = rotary()
        self.backbone.rotary_emb.register_forward_hook(_in_autocast_type)
        fuse_norms(self.backbone)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=self.backbone.config.initializer_range)

    def checkpoint(self, on: bool) -> None:
        """Whether training keeps only the layers' inputs and computes the rest again in the backward pass."""
        if on:
            self.backbone.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.backbone.activation_checkpointing_disable()
        self.backbone.train(on)  # transformers checkpoints in training mode alone; there is no dropout to wake

    def positions(
        self, mask: Bool[Tensor, "B T"], spans: Sequence[Span], vision: VisionConfig | InternViTConfig | None
    ) -> tuple[Int[Tensor, "..."], Int[Tensor, "B"]]:
        """Positions [3, B, T] (M-RoPE) or [B, T] of a padded batch, and the next free position of each row."""
        if self.config.type == "qwen2_5_vl":
            return mrope_positions(mask, spans, vision)
        counts = mask.long()
        return (counts.cumsum(1) - 1) * counts, counts.sum(1)

    def embed(self, tokens: Int[Tensor, "*B"]) -> Float[Tensor, "*B D"]:
        """Input embeddings of tokens."""
        return self.backbone.embed_tokens(tokens)

    def hidden(
        self, embeds: Float[Tensor, "B T D"], positions: Int[Tensor, "..."], mask: Bool[Tensor, "B T"], shared: int = 0
    ) -> Float[Tensor, "B T D"]:
        """Last states after the final norm. Causal; masked positions are seen by nobody. `mask` may be on the CPU.

        With `packing`, rows padded on the right are laid end to end; the first `shared` positions of all rows must be
        the same then. States of masked positions mean nothing.
        """
        if self.packing and len(mask) > 1:
            layout = packed(mask.sum(1).tolist(), mask.shape[1], self.config.width, shared)
            if layout is not None:
                places = torch.stack([layout.pack(axis) for axis in positions.view(-1, *mask.shape)])
                # As transformers makes masks itself: numbers to add where attention is written out, else truths.
                eager = self.config.attention == "eager"
                out = self.backbone(
                    inputs_embeds=layout.pack(embeds),
                    position_ids=places if positions.ndim == 3 else places[0],
                    attention_mask=layout.bias(True, embeds) if eager else layout.sees(True).to(embeds.device),
                    use_cache=False,
                )
                return layout.unpack(out.last_hidden_state)
        seen = None if bool(mask.all()) else mask.to(embeds.device)
        out = self.backbone(inputs_embeds=embeds, position_ids=positions, attention_mask=seen, use_cache=False)
        return out.last_hidden_state

    def logits(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Scores over the vocabulary."""
        if self.head is None:
            return nn.functional.linear(hidden, self.backbone.embed_tokens.weight)
        return self.head(hidden)

    def start(
        self,
        embeds: Float[Tensor, "B T D"],
        positions: Int[Tensor, "..."],
        mask: Bool[Tensor, "B T"],
        following: Int[Tensor, "B"],
    ) -> tuple[Float[Tensor, "B T D"], LanguageState]:
        """Hidden states of left-padded prompts, and the state to go on from."""
        cache = DynamicCache(config=self.backbone.config)
        out = self.backbone(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state, LanguageState(cache, mask, following)

    def step(self, state: LanguageState, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """Feed one token per row; returns the state at that token's own position and advances `state`."""
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(tokens), 1)], dim=1)
        positions = state.next_position[:, None]
        if self.config.type == "qwen2_5_vl":
            positions = positions.expand(3, -1, -1)
        out = self.backbone(
            inputs_embeds=self.embed(tokens)[:, None],
            position_ids=positions,
            attention_mask=state.mask,
            past_key_values=state.cache,
            use_cache=True,
        )
        state.next_position = state.next_position + 1
        return out.last_hidden_state[:, 0]
