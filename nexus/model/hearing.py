"""Sound to language embeddings: a Whisper-shaped encoder and the adapter that concatenates five states.

Sources: Whisper (Radford et al. 2022) for the encoder; Nexus section 3.1 for the adapter. Encoder frames, token
counts and windows are computed by `HearingConfig`, the same formulas the loader uses.
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nexus.errors import Misaligned
from nexus.model.layers import Block, BlockConfig, padding_bias, rotary
from nexus.model.packing import packed
from nexus.organs import AdapterConfig, EncoderConfig, HearingConfig, OutsideEncoder
from nexus.types import Encoded, Sound


def sinusoids(length: int, width: int) -> Float[Tensor, "L E"]:
    """Whisper's fixed positions: sines in the first half of the channels, cosines in the second."""
    with torch.device("cpu"):  # in no checkpoint of ours: real also in a model on the meta device
        rates = torch.exp(-torch.log(torch.tensor(10_000.0)) / (width // 2 - 1) * torch.arange(width // 2))
        angles = torch.arange(length)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)


MEL_GRAIN = 32  # frames of 10 ms; with packs end to end, windows of sound are padded to multiples of so many


class WhisperEncoder(nn.Module):
    """Two convolutions and bidirectional transformer layers over log-mel frames of 10 ms."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv1 = nn.Conv1d(config.num_mels, width, 3, stride=config.conv_strides[0], padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=config.conv_strides[1], padding=1)
        rope = config.positions == "rope"
        if not rope:
            frames = config.frames_for(round(config.window_seconds * 100))
            self.register_buffer("positions", sinusoids(frames, width), persistent=False)
        block = BlockConfig(width, config.heads, config.ffn_width, "layer", "gelu", bias=True, rope=rope)
        self.checkpointing = False
        self.packing = False  # whether training lays windows end to end instead of padding them
        self.layers = nn.ModuleList(Block(block) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, mel: Float[Tensor, "X F L"], lengths: Int[Tensor, "X"]) -> Float[Tensor, "X L2 E"]:
        """States of each window; padding beyond its length never reaches a valid state."""
        first, second = self.config.conv_strides
        mel, lengths = mel.to(self.conv1.weight), lengths.to("cpu")  # lengths steer the computation
        states = self.config.frames_for(mel.shape[2])
        full = round(self.config.window_seconds * 100)
        if self.packing and mel.shape[2] < full:  # few shapes, as those of packs are
            mel = nn.functional.pad(mel, (0, min(-mel.shape[2] % MEL_GRAIN, full - mel.shape[2])))
        x = nn.functional.gelu(self.conv1(_silence_padding(mel, lengths)))
        lengths = (lengths + first - 1) // first
        x = nn.functional.gelu(self.conv2(_silence_padding(x, lengths)))
        lengths = (lengths + second - 1) // second
        x = x.transpose(1, 2)  # [X, E, L2] -> [X, L2, E]
        frames = x.shape[1]
        if self.config.positions != "rope":
            x = x + cast(Tensor, self.positions)[:frames].to(x)
        places = torch.arange(frames)[None]
        layout = packed(lengths.tolist(), frames, self.config.width) if self.packing else None
        if layout is not None:
            x, places = layout.pack(x), layout.pack(places.expand(len(lengths), -1))
            bias: Tensor | None = layout.bias(False, x)
        else:
            bias = padding_bias(lengths.to(x.device), frames) if int(lengths.min()) < frames else None
        turns = None
        if self.config.positions == "rope":
            turns = rotary(places.to(x.device), self.config.width // self.config.heads)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, bias, turns, use_reentrant=False)
            else:
                x = layer(x, bias, turns)
        return self.norm(x if layout is None else layout.unpack(x))[:, :states]


def _silence_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Zero the columns of [X, F, L] beyond each length, so that convolutions see the same as without padding."""
    if int(lengths.min()) == x.shape[2]:
        return x
    return x * (torch.arange(x.shape[2], device=x.device) < lengths.to(x.device)[:, None])[:, None]


class ConcatMLP(nn.Module):
    """Adapter: the first layer sees `stack` consecutive states as one vector, the second maps to language width."""

    def __init__(self, config: AdapterConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        self.stack = config.stack
        self.first = nn.Linear(config.stack * width_in, config.width)
        self.second = nn.Linear(config.width, width_out)

    def forward(self, states: Float[Tensor, "M E"]) -> Float[Tensor, "M2 D"]:
        """States whose number is a multiple of `stack` to embeddings, M2 = M / stack."""
        stacked = states.reshape(-1, self.stack * states.shape[-1]).to(self.first.weight.dtype)
        return self.second(nn.functional.gelu(self.first(stacked)))


class Hearing(nn.Module):
    """The organ: encoder and adapter. `tokens_for` on its config tells the loader how long each sound becomes."""

    def __init__(self, config: HearingConfig, language_width: int) -> None:
        super().__init__()
        self.config = config
        self.encoder: nn.Module
        match config.encoder:
            case OutsideEncoder() as outside:
                self.encoder = outside.resolve()(outside.num_mels, outside.width, **outside.settings)
                _check_promise(outside)
            case EncoderConfig() as whisper:
                self.encoder = WhisperEncoder(whisper)
        self.adapter = ConcatMLP(config.adapter, config.encoder.width, language_width)

    def encode(self, sound: Sound) -> Float[Tensor, "X L2 E"]:
        """Encoder states of every window; `config.encoder.frames_for` says how many of a row are valid."""
        lengths = sound.lengths
        mel = sound.mel.to(self.adapter.first.weight)
        if self.config.encoder.pad_to_window:  # the loader has filled the windows up; the encoder sees all of them
            lengths = torch.full_like(lengths, sound.mel.shape[2])
        return self.encoder(mel, lengths)

    def forward(self, sound: Sound) -> Encoded:
        """Embeddings of all items, packed. The last group of `stack` states of a window is filled up with zeros."""
        states = self.encode(sound)
        stack = self.config.adapter.stack
        frames = [self.config.encoder.frames_for(int(n)) for n in sound.lengths]
        _check_states(states, max(frames), self.config.encoder.width)
        groups = [-(-n // stack) for n in frames]
        padded = nn.functional.pad(states, (0, 0, 0, max(0, max(groups) * stack - states.shape[1])))
        counts = torch.tensor(frames, device=states.device)[:, None]
        valid = torch.arange(padded.shape[1], device=states.device) < counts
        padded = padded * valid[..., None]
        embeds = self.adapter(torch.cat([row[: n * stack] for row, n in zip(padded, groups, strict=True)]))
        lengths, at = [], 0
        for count in sound.windows:
            lengths.append(sum(groups[at : at + count]))
            at += count
        return Encoded(embeds, lengths)


def _check_states(states: Tensor, frames: int, width: int) -> None:
    """Raises Misaligned when an encoder gives fewer states, or narrower ones, than its section promises."""
    if states.ndim != 3 or states.shape[1] < frames or states.shape[2] != width:
        raise Misaligned(
            f"hearing.encoder gave states {list(states.shape)} where its frames_for and width promise {frames} of "
            f"width {width}; make the two agree"
        )


def _check_promise(config: OutsideEncoder) -> None:
    """Try an encoder from outside on a second of sound without numbers, before any weight is read."""
    with torch.device("meta"), torch.no_grad():
        encoder = config.resolve()(config.num_mels, config.width, **config.settings).eval()
        mel = torch.zeros(1, config.num_mels, 100)
    try:
        with torch.no_grad():
            states = encoder(mel, torch.tensor([100], device="cpu"))
    except (NotImplementedError, RuntimeError):
        return  # it needs real numbers: its first sound will show
    _check_states(states, config.frames_for(100), config.width)
