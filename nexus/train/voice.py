"""The voice alone: stage 3 learns from prepared states and codes, so nothing but the voice need be in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from nexus.errors import BadConfig
from nexus.model.folder import check_names, check_weight, read_config, weight_files, weight_shapes
from nexus.model.voice.delayed import DelayedVoice
from nexus.organs import ModelConfig
from nexus.types import SpeechBatch

PREFIX = "voice."


class VoiceAlone(nn.Module):
    """The voice of a model under the name it has there, and nothing else: `voice.*` are all its parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.voice is None:
            raise BadConfig("this model has no voice to train, expected voice and codec in its recipe; add them")
        self.config = config
        self.voice = DelayedVoice(config.voice, config.language.width)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.voice.start_vector.device

    def forward(self, batch: SpeechBatch) -> dict[str, Float[Tensor, ""]]:
        """Losses by name, those of `OmniModel.forward` for the same batch."""
        weight = self.voice.start_vector
        script = replace(
            batch.script,
            states=batch.script.states.to(weight),
            embeds=batch.script.embeds.to(weight),
            letters=batch.script.letters.to(weight.device),
            lengths=batch.script.lengths.to(weight.device),
        )
        previous = None if batch.previous is None else batch.previous.to(weight.device)
        return self.voice.loss(script, batch.codes.to(weight.device), batch.lengths.to(weight.device), previous)


def load_voice(folder: Path, device: str | torch.device = "cpu") -> VoiceAlone:
    """The voice of a model folder, in evaluation mode and in the folder's own types; the other weights are not read.

    Raises BadCheckpoint as `load_model` does, for the voice's weights.
    """
    config, _ = read_config(folder)
    with torch.device("meta"):
        model = VoiceAlone(config)
    expected, weights = model.state_dict(), {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name.startswith(PREFIX):
                    weights[name] = file.get_tensor(name).clone()
    check_names(weights, expected, str(folder))
    for name, tensor in weights.items():
        check_weight(name, tensor, expected[name], str(folder))
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()


def weight_fingerprints(folder: Path, organs: Sequence[str]) -> dict[str, str]:
    """Sixteen hex digits over the weights of each organ of a model folder, however they are cut into files.

    Weights are read one at a time. An organ that the model lacks has the digest of nothing. Raises BadCheckpoint.
    """
    places = {name: path for path in weight_files(folder) for name in weight_shapes(path)}
    found = {}
    for organ in organs:
        digest = hashlib.sha256()
        names = sorted(name for name in places if name.startswith(f"{organ}."))
        for name in names:
            with safe_open(places[name], framework="pt") as file:
                tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        found[organ] = digest.hexdigest()[:16]
    return found
