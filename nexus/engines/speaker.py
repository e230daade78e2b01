"""Whose voice it is: embeddings of a local speaker model of transformers (WavLM, wav2vec2 and their kind)."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

from nexus.errors import BadCheckpoint
from nexus.media import load, resample
from nexus.types import Audio

FAULTS = (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError)


class SpeakerModel:
    """A speaker model of the user's. Raises BadCheckpoint on a folder it cannot open or that lacks weights."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise BadCheckpoint(f"{folder}: no such folder, expected a local speaker model of transformers")
        try:
            self._extract = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self._model, info = AutoModelForAudioXVector.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
        except FAULTS as error:
            reason = str(error).strip().split("\n")[0]
            raise BadCheckpoint(
                f"{folder}: cannot be opened as a speaker model (AutoModelForAudioXVector): {reason}; give a folder "
                "with config.json, preprocessor_config.json and safetensors weights"
            ) from None
        missing = sorted(info["missing_keys"])
        if missing:
            raise BadCheckpoint(f"{folder}: lacks {len(missing)} weights, first {missing[0]}; copy the folder again")
        self._model.eval()
        self.id = f"{self._model.config.model_type} {folder.name}"

    @torch.no_grad()
    def embed(self, audio: Audio) -> Float[np.ndarray, "D"]:
        """The embedding of one voice; sound at any rate, loaded or not. Raises BadMedia."""
        sound = load(audio) if audio.samples is None else audio
        assert isinstance(sound, Audio) and sound.samples is not None
        rate_hz = self._extract.sampling_rate
        wave = resample(sound.samples, sound.rate_hz, rate_hz)
        inputs = self._extract(wave, sampling_rate=rate_hz, return_tensors="pt")
        return np.asarray(self._model(**inputs).embeddings[0])
