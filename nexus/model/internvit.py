"""Pictures and films to language embeddings as in VITA-1.5: InternViT, pixel shuffle, two-layer projector.

Sources: InternViT-300M (Chen et al. 2024) for the tower, VITA-1.5 for the way from its states to the language model:
the last layer's states without a final norm, class token dropped, times 0.5, 2 x 2 neighbours shuffled into channels,
linear, exact GELU, linear. The published stochastic depth (0.1, in training only) is left out.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nexus.model.fused import attend
from nexus.organs import Attention, InternViTConfig
from nexus.types import Encoded, Sight


class ScaledBlock(nn.Module):
    """Pre-norm transformer layer whose two branches are weighted per channel (layer scale)."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.attention = config.heads, config.attention
        self.attention_norm = nn.LayerNorm(width, config.norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attention_scale = nn.Parameter(torch.ones(width))
        self.ffn_norm = nn.LayerNorm(width, config.norm_eps)
        self.up = nn.Linear(width, config.ffn_width)
        self.down = nn.Linear(config.ffn_width, width)
        self.ffn_scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "N T E"]) -> Float[Tensor, "N T E"]:
        """Every position attends to all positions of its picture."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = _attend(q, k, v, self.attention).transpose(1, 2).flatten(2)
        x = x + self.attention_scale * self.out(mixed)
        return x + self.ffn_scale * self.down(nn.functional.gelu(self.up(self.ffn_norm(x))))


def _attend(q: Tensor, k: Tensor, v: Tensor, how: Attention) -> Tensor:
    if how == "sdpa":
        return nn.functional.scaled_dot_product_attention(q, k, v)
    return attend(q, k, v, scale=q.shape[-1] ** -0.5)


class Tower(nn.Module):
    """Patch rows of equally large pictures to the raw states of the last layer."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.config = config
        positions = (config.side // config.patch) ** 2 + 1
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, config.width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, positions, config.width))
        # Its weight keeps the published shape; pictures come as rows of patches, so it is applied as a linear map.
        self.patches = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.layers = nn.ModuleList(ScaledBlock(config) for _ in range(config.layers))

    def forward(
        self, rows: Float[Tensor, "N P pixels"], high: int, wide: int, checkpointing: bool = False
    ) -> Float[Tensor, "N P E"]:
        """States of high x wide patches in raster order, the class token dropped.

        With `checkpointing` only the layers' inputs are kept for the backward pass.
        """
        weight = self.patches.weight.flatten(1)
        x = nn.functional.linear(rows.to(weight), weight, self.patches.bias)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions_for(high, wide)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
        return x[:, 1:]

    def positions_for(self, high: int, wide: int) -> Float[Tensor, "1 T E"]:
        """The position table, resized (bicubic) to another grid than its own; the class position stays."""
        side = self.config.side // self.config.patch
        if (high, wide) == (side, side):
            return self.positions
        first, table = self.positions.split([1, side * side], dim=1)
        table = table.float().transpose(1, 2).unflatten(2, (side, side))
        table = nn.functional.interpolate(table, (high, wide), mode="bicubic", align_corners=False)
        return torch.cat([first, table.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)


def pixel_shuffle(states: Float[Tensor, "N P E"], high: int, wide: int, block: int) -> Float[Tensor, "N P2 E2"]:
    """block x block neighbours as one vector, P2 = P / block^2, E2 = E x block^2.

    Vectors stand in raster order; inside one, the cells follow each other row by row, each with all its channels.
    """
    n, _, width = states.shape
    cells = states.view(n, high // block, block, wide // block, block, width).transpose(2, 3)
    return cells.reshape(n, -1, block * block * width)


class InternViT(nn.Module):
    """The organ: `tower`, and the `projector`, which is the vision adapter."""

    def __init__(self, config: InternViTConfig, language_width: int) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.tower = Tower(config)
        self.projector = nn.Sequential(
            nn.Linear(config.width * config.shuffle**2, config.projector_width),
            nn.GELU(),
            nn.Linear(config.projector_width, language_width),
        )

    def project(self, states: Float[Tensor, "N P E"], high: int, wide: int) -> Float[Tensor, "N P2 D"]:
        """Language embeddings of the tower's states, P2 = P / shuffle^2."""
        return self.projector(pixel_shuffle(states * self.config.scale, high, wide, self.config.shuffle))

    def forward(self, sight: Sight) -> Encoded:
        """Embeddings of all items, packed: grid / 4 tokens each; the frames of a film follow each other."""
        sizes = {(int(high), int(wide)) for _, high, wide in sight.grids.tolist()}
        assert len(sizes) == 1, f"pictures come in one size, given patch grids {sorted(sizes)}"
        ((high, wide),) = sizes
        pictures = sight.rows.unflatten(0, (-1, high * wide))
        states = self.tower(pictures, high, wide, self.checkpointing and torch.is_grad_enabled())
        embeds = self.project(states, high, wide)
        return Encoded(embeds.flatten(0, 1), (sight.grids.prod(1) // self.config.shuffle**2).tolist())


def published_names(config: InternViTConfig) -> dict[str, str]:
    """Tensor names of VITA-1.5's files (there behind a `model.`) to those of an `InternViT`; all shapes are equal."""
    embeddings = "vision_tower.vision_tower.embeddings"
    names = {
        f"{embeddings}.class_embedding": "tower.class_token",
        f"{embeddings}.position_embedding": "tower.positions",
    }
    modules = {
        f"{embeddings}.patch_embedding": "tower.patches",
        "mm_projector.0": "projector.0",
        "mm_projector.2": "projector.2",
    }
    for layer in range(config.layers):
        theirs, ours = f"vision_tower.vision_tower.encoder.layers.{layer}", f"tower.layers.{layer}"
        names |= {f"{theirs}.ls1": f"{ours}.attention_scale", f"{theirs}.ls2": f"{ours}.ffn_scale"}
        modules |= {
            f"{theirs}.norm1": f"{ours}.attention_norm",
            f"{theirs}.attn.qkv": f"{ours}.qkv",
            f"{theirs}.attn.proj": f"{ours}.out",
            f"{theirs}.norm2": f"{ours}.ffn_norm",
            f"{theirs}.mlp.fc1": f"{ours}.up",
            f"{theirs}.mlp.fc2": f"{ours}.down",
        }
    return names | {
        f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in modules.items() for kind in ("weight", "bias")
    }
