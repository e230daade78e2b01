"""Stage 0: how stand-ins for published checkpoints begin, and the auxiliary heads that train them and help in stage 1.
The heads live here, not in the model, and are absent from every saved model."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nexus.model.layers import Block
from nexus.model.omni import OmniModel

CHARACTERS = "abcdefghijklmnopqrstuvwxyz' "
LIKING = 1.5  # by what the language model's keys are scaled: with 1 and with 2 films are learned later
# Of a rotation's angles, so many of the fastest tell neighbours apart. With this strength each, a head gives the token
# it looks for 0.8 of its attention, that token's neighbours most of the rest, and nothing to what is further away.
FAST_ANGLES, FAST_STRENGTH = 8, 4.0


class CharacterCTC(nn.Module):
    """Spelling from encoder states by connectionist temporal classification (Graves et al. 2006).

    It gives the audio encoder what Whisper's pretraining gives the published one: states that know the sounds.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, len(CHARACTERS) + 1)  # 0 is the blank

    def forward(
        self, states: Float[Tensor, "X L2 E"], lengths: Int[Tensor, "X"], texts: Sequence[str]
    ) -> Float[Tensor, ""]:
        """Mean loss per character; texts are lower case letters, apostrophes and spaces."""
        scores = self.head(states).float().log_softmax(-1).transpose(0, 1)  # [L2, X, characters]
        spelled = [torch.tensor([CHARACTERS.index(c) + 1 for c in text]) for text in texts]
        sizes = torch.tensor([len(s) for s in spelled])
        return nn.functional.ctc_loss(scores, torch.cat(spelled), lengths, sizes, zero_infinity=True)

    @torch.no_grad()
    def read(self, states: Float[Tensor, "X L2 E"], lengths: Int[Tensor, "X"]) -> list[str]:
        """Greedy spelling."""
        texts = []
        for best, length in zip(self.head(states).argmax(-1), lengths.tolist(), strict=True):
            kept = torch.unique_consecutive(best[:length])
            texts.append("".join(CHARACTERS[i - 1] for i in kept.tolist() if i))
        return texts


class WordCTC(nn.Module):
    """The words of a sound from the adapter's embeddings, by CTC among the language model's own embeddings of all
    tokens: a sound comes to lie beside the words that are heard in it, where a frozen language model finds them."""

    def __init__(self, known: Float[Tensor, "V D"]) -> None:
        super().__init__()
        self.known = nn.functional.normalize(known.detach(), dim=-1)
        self.blank = nn.Parameter(0.02 * torch.randn(1, known.shape[1]))
        self.sharpness = nn.Parameter(torch.tensor(3.0))  # logarithm of the cosines' factor

    def forward(
        self, embeds: Float[Tensor, "M2 D"], lengths: Sequence[int], texts: Sequence[Sequence[int]]
    ) -> Float[Tensor, ""]:
        """Mean loss per token of sounds whose embeddings lie end to end; one with too few for its words has none."""
        heard = nn.functional.normalize(embeds.float(), dim=-1)
        classes = torch.cat([nn.functional.normalize(self.blank, dim=-1), self.known])
        scores = (self.sharpness.exp() * (heard @ classes.T)).log_softmax(-1)
        padded = nn.utils.rnn.pad_sequence(scores.split(list(lengths)))  # [M2 of the longest, X, 1 + V]
        told = torch.tensor([token + 1 for text in texts for token in text])
        sizes = torch.tensor([len(text) for text in texts])
        return nn.functional.ctc_loss(padded, told, torch.tensor(lengths), sizes, zero_infinity=True)


class MannerNames(nn.Module):
    """Who speaks how, from mean and deviation of the encoder's states over time: one classifier per attribute.

    Spelling alone would teach the audio encoder to forget voices. The published one has heard enough of them.
    """

    def __init__(self, width: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(2 * width, n) for n in classes)

    def forward(
        self, states: Float[Tensor, "X L2 E"], lengths: Int[Tensor, "X"], labels: Int[Tensor, "X A"]
    ) -> Float[Tensor, ""]:
        """Mean cross entropy over attributes; a label below 0 is not asked for."""
        scores = self.scores(states, lengths)
        asked = [a for a in range(len(scores)) if bool((labels[:, a] >= 0).any())]
        losses = [nn.functional.cross_entropy(scores[a].float(), labels[:, a], ignore_index=-1) for a in asked]
        return torch.stack(losses).mean() if losses else states.sum() * 0.0

    def scores(self, states: Float[Tensor, "X L2 E"], lengths: Int[Tensor, "X"]) -> list[Float[Tensor, "X C"]]:
        """Scores of the classes of every attribute."""
        valid = (torch.arange(states.shape[1]) < lengths[:, None])[..., None]
        mean = (states * valid).sum(1) / lengths[:, None]
        deviation = (((states - mean[:, None]) * valid).square().sum(1) / lengths[:, None] + 1e-5).sqrt()
        pooled = torch.cat([mean, deviation], dim=1)
        return [head(pooled) for head in self.heads]


class CellNames(nn.Module):
    """What lies in each cell of a picture, from the vision tower's merged tokens: for every attribute the name they
    come closest to, among the language model's own embeddings of those names.

    It gives the vision tower what contrastive pretraining (CLIP, Radford et al. 2021) gave the published one: tokens
    that lie beside the words for what they show. A classifier of its own would name them as well, in a space of which
    the language model knows nothing.
    """

    def __init__(self, names: Sequence[Float[Tensor, "_ D"]]) -> None:
        """`names`: the embeddings of one attribute's names each."""
        super().__init__()
        self.names = [nn.functional.normalize(known.detach(), dim=-1) for known in names]
        self.sharpness = nn.Parameter(torch.full((len(names),), 3.0))  # logarithms of the cosines' factors

    def forward(self, tokens: Float[Tensor, "M D"], labels: Int[Tensor, "M A"]) -> Float[Tensor, ""]:
        """Mean cross entropy over attributes."""
        seen = nn.functional.normalize(tokens.float(), dim=-1)
        scores = [
            sharpness.exp() * (seen @ known.T) for sharpness, known in zip(self.sharpness, self.names, strict=True)
        ]
        return torch.stack([nn.functional.cross_entropy(s, labels[:, a]) for a, s in enumerate(scores)]).mean()


@torch.no_grad()
def look_for_likes(model: OmniModel) -> None:
    """Let every second head of attention begin by looking for what is like the token that looks: its queries start as
    its keys. The other heads stay random, free for what is found by its place.

    It gives language model and audio encoder a start that pretraining gave the published ones, in whose weights the
    likeness was found (mimetic initialisation, Trockman and Kolter 2023). Copying a word, and finding in a picture
    what a word names, are learned in a fraction of the steps.
    """
    config = model.config.language
    for layer in model.language.backbone.layers:
        attention: Any = layer.self_attn
        _look_for_likes(attention.q_proj.weight, attention.k_proj.weight, config.width // config.heads, LIKING)
    layers = [] if model.hearing is None else model.hearing.encoder.modules()
    for block in layers:
        if isinstance(block, Block):
            _look_for_likes(block.query.weight, block.key.weight, block.config.width // block.config.heads, 1.0)


@torch.no_grad()
def look_back(model: OmniModel) -> None:
    """Let the heads of the language model's first layer that share its last keys begin by looking at the token before,
    the token before that, and so on.

    Such heads stand in the first layers of every pretrained language model, and looking up what followed a word before
    is built on them (Olsson et al. 2022, In-context Learning and Induction Heads); with few steps of training they
    come late. Only the biases of queries and keys say so: the rotation of positions makes of a constant query and a
    constant key a function of their distance.
    """
    config, width = model.config.language, model.config.language.width // model.config.language.heads
    if config.kv_heads == 1:
        return  # nothing would be left that looks for likes
    attention: Any = model.language.backbone.layers[0].self_attn
    angles = config.rope_theta ** (-2 * torch.arange(min(FAST_ANGLES, width // 2)) / width)
    own = slice((config.kv_heads - 1) * width, (config.kv_heads - 1) * width + len(angles))
    attention.k_proj.bias[own] = FAST_STRENGTH
    heads = range(config.heads - config.heads // config.kv_heads, config.heads)
    for distance, head in enumerate(heads, start=1):
        at = head * width
        nn.init.normal_(attention.q_proj.weight[at : at + width], std=0.02)
        attention.q_proj.bias[at : at + len(angles)] = FAST_STRENGTH * torch.cos(distance * angles)
        at += width // 2
        attention.q_proj.bias[at : at + len(angles)] = -FAST_STRENGTH * torch.sin(distance * angles)


def _look_for_likes(queries: Float[Tensor, "q D"], keys: Float[Tensor, "k D"], head_width: int, factor: float) -> None:
    """Keys times `factor`, and every second head's queries equal to the keys they are compared with."""
    keys *= factor
    shared = len(queries) // len(keys)  # heads of queries per head of keys
    for head, rows in enumerate(queries.split(head_width)):
        if head % 2 == 0:
            rows.copy_(keys.split(head_width)[head // shared])
