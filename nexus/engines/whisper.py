"""Speech to text by a Whisper model of transformers in a local folder: safetensors alone, no code, no download."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from nexus.engines.transcribe import Heard
from nexus.errors import BadCheckpoint, BadConfig, BadMedia, NexusError
from nexus.media import resample
from nexus.types import Audio

RATE_HZ = 16_000
MAX_SECONDS = 30.0  # the model's window; what is longer has to be cut at its pauses first
FAULTS = (OSError, ValueError, RuntimeError, KeyError, ImportError)  # what transformers raises for a bad folder


class Whisper:
    """The model of `folder` on `device`, hearing `batch` clips at a time. `id` names the folder.

    Raises BadCheckpoint where the folder is no Whisper model in safetensors, BadConfig for a device that is not there.
    Greedy: the same clips in the same batches give the same words.
    """

    def __init__(self, folder: Path, device: str = "cpu", batch: int = 8) -> None:
        if not folder.is_dir():
            raise BadCheckpoint(f"{folder}: no such folder, expected a Whisper model of transformers; fetch it first")
        # Typed loosely: transformers hides these methods behind descriptors that mypy does not see through.
        kinds: tuple[Any, Any] = (WhisperForConditionalGeneration, WhisperProcessor)
        try:
            model = kinds[0].from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype="auto"
            )
            self._processor = kinds[1].from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except FAULTS as error:
            said = " ".join(str(error).split())[:200]
            raise BadCheckpoint(
                f"{folder}: cannot be opened as a Whisper model ({said}); fetch the folder again"
            ) from None
        try:
            self._model = model.eval().to(device)
        except (RuntimeError, AssertionError) as error:
            said = " ".join(str(error).split())[:120]
            raise BadConfig(f"device {device!r}: cannot be used ({said}); name cpu, or one that is there") from None
        self._batch = batch
        self.id = f"whisper {folder.name}"

    def hear(self, audios: Sequence[Audio], language: str) -> list[Heard]:
        """What is said in every clip (loaded mono sound at any rate, at most 30 s), in `language` (ISO 639-1), with the
        probability of its tokens (geometric mean) as confidence.

        Raises BadMedia for sound that is not finite, empty or longer, NexusError for a language the model lacks.
        """
        waves = [_wave(audio, number) for number, audio in enumerate(audios)]
        options = self._options(language)
        starts = range(0, len(waves), self._batch)
        return [heard for start in starts for heard in self._heard(waves[start : start + self._batch], options)]

    def _options(self, language: str) -> dict[str, str]:
        known = getattr(self._model.generation_config, "lang_to_id", None)
        if known is None:
            if language != "en":
                raise NexusError(f"{self.id} hears English alone, given {language!r}; take a multilingual model")
            return {}
        if f"<|{language}|>" not in known:
            raise NexusError(f"{self.id} hears {len(known)} languages, {language!r} is none of them; correct it")
        return {"language": language, "task": "transcribe"}

    @torch.inference_mode()
    def _heard(self, waves: Sequence[np.ndarray], options: dict[str, str]) -> list[Heard]:
        features = self._processor.feature_extractor(
            list(waves), sampling_rate=RATE_HZ, return_tensors="pt", return_attention_mask=True
        )
        made = self._model.generate(
            features.input_features.to(self._model.device, self._model.dtype),
            attention_mask=features.attention_mask.to(self._model.device),
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        scores = self._model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
        texts = self._processor.batch_decode(made.sequences, skip_special_tokens=True)
        tokens = made.sequences[:, -scores.shape[1] :]
        written = tokens != self._model.generation_config.pad_token_id
        written[:, 0] = True  # a first token that ends the text is its whole content
        logs = [row[mask].float().mean() for row, mask in zip(scores, written, strict=True)]
        return [
            Heard(" ".join(text.split()), float(torch.exp(log).clamp(0, 1)))
            for text, log in zip(texts, logs, strict=True)
        ]


def _wave(audio: Audio, number: int) -> np.ndarray:
    """f32 [W] at 16 kHz."""
    assert audio.samples is not None, "sound is not loaded"
    if not len(audio.samples) or not np.isfinite(audio.samples).all():
        raise BadMedia(f"clip {number}: expected finite samples, given {len(audio.samples)}, not all finite; repair it")
    if audio.seconds > MAX_SECONDS:
        raise BadMedia(
            f"clip {number}: expected at most {MAX_SECONDS:g} s, given {audio.seconds:.1f} s; cut it at its pauses"
        )
    return resample(audio.samples.astype(np.float32), audio.rate_hz, RATE_HZ)
