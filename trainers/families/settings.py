"""What a person says about the base model. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from trainers.families.facts import BaseOptions, Prediction
from trainers.settings import Settings


class BaseSettings(Settings):
    """The base model that the LoRA is trained on."""

    model: str = "pocket"
    """Base model: `pocket` (ships with the program), a checkpoint file, a folder in diffusers layout, or a hub id."""
    family: Literal["auto", "sd", "sd1", "sd2", "sdxl"] = "auto"
    """Model family that these settings are meant for; a base of another one is refused. `sd`: 1.x and 2.x. `auto`: any."""
    vae: str = ""
    """VAE of your own (file or folder) in place of the base's. Empty: the base's."""
    clip_skip: int = Field(default=1, ge=1, le=12)
    """Layer of the text encoder that is read: 1 where the family reads it, 2 one earlier, as many anime models want."""
    prediction_type: Prediction = "auto"
    """What the denoiser predicts, where a checkpoint file does not say it. `auto`: by the file."""
    zero_terminal_snr: bool = False
    """Train the last timestep on pure noise (arXiv 2305.08891), for bases with v-prediction that were made so."""

    @field_validator("model", "vae")
    @classmethod
    def _without_quotes(cls, value: str) -> str:
        """As file managers copy a path."""
        value = value.strip()
        return value[1:-1] if len(value) > 2 and value[0] == value[-1] and value[0] in "\"'" else value

    @property
    def options(self) -> BaseOptions:
        """How the base is to be read."""
        return BaseOptions(self.vae, self.clip_skip, self.prediction_type, self.zero_terminal_snr)
