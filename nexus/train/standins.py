"""Stage 0: auxiliary heads that train stand-ins for published checkpoints. They live here, not in the model, and are
absent from every saved model."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

CHARACTERS = "abcdefghijklmnopqrstuvwxyz' "


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
    """What lies in each cell of a picture, from the vision tower's merged tokens: one classifier per attribute.

    It gives the vision tower what Qwen2.5-VL's pretraining gives the published one: tokens that know what they see.
    """

    def __init__(self, width: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in classes)

    def forward(self, tokens: Float[Tensor, "M D"], labels: Int[Tensor, "M A"]) -> Float[Tensor, ""]:
        """Mean cross entropy over attributes."""
        losses = [nn.functional.cross_entropy(head(tokens).float(), labels[:, a]) for a, head in enumerate(self.heads)]
        return torch.stack(losses).mean()
