"""What is known of a base model before any weight is read: the families, and one base's own facts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ASSETS = Path(__file__).resolve().parents[2] / "assets"
Prediction = Literal["auto", "epsilon", "v_prediction"]


@dataclass(frozen=True)
class FamilyFacts:
    """What is true of every model of a family.

    `context` is the width of the text states that the denoiser reads; `base_version` is how LoRA files name the family.
    `unread` counts for each text encoder its last layers that the family never reads; one that is not in it is read to
    its end at any clip skip, as its pooled state is. `pipeline` is diffusers' class for the whole model.
    """

    name: str
    title: str
    context: int
    base_version: str
    unread: Mapping[str, int] = field(default_factory=lambda: {"text_encoder": 0})
    text_encoders: tuple[str, ...] = ("text_encoder",)
    pipeline: str = "StableDiffusionPipeline"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that adapters may go into, the denoiser first."""
        return ("unet", *self.text_encoders)


FAMILIES: dict[str, FamilyFacts] = {
    "sd1": FamilyFacts("sd1", "Stable Diffusion 1.x", 768, "sd_v1"),
    "sd2": FamilyFacts("sd2", "Stable Diffusion 2.x", 1024, "sd_v2"),
    "sdxl": FamilyFacts(
        "sdxl",
        "Stable Diffusion XL",
        2048,
        "sdxl_base_v1-0",
        unread={"text_encoder": 1},
        text_encoders=("text_encoder", "text_encoder_2"),
        pipeline="StableDiffusionXLPipeline",
    ),
}


@dataclass(frozen=True)
class BaseOptions:
    """How a person wants a base to be read, where they want it otherwise than the base says itself."""

    vae: str = ""
    """A VAE of their own: a .safetensors file or a folder with config.json. Empty: the base's."""
    clip_skip: int = 1
    """1: the text encoder is read where the family reads it; 2: one layer earlier; and so on."""
    prediction_type: Prediction = "auto"
    zero_terminal_snr: bool = False


@dataclass(frozen=True)
class BaseModelFacts:
    """What a base model says about itself before any weight is read.

    Sizes in pixels. `step` divides every side of a training bucket; a picture to draw is only held to `pixels_per_latent`.
    `folder` holds the configuration (and, in diffusers layout, the weights); `checkpoint` is the single file, if it is one.
    """

    name: str
    folder: Path
    family: FamilyFacts
    prediction_type: str
    resolution: int
    latent_channels: int
    pixels_per_latent: int
    step: int
    is_pocket: bool
    checkpoint: Path | None = None
    vae: Path | None = None
    """A VAE of the person's own: a file or a folder."""
    clip_skip: int = 1
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    """Part (unet, vae, text_encoder, ..., scheduler) -> its configuration as diffusers and transformers read it."""
    guessed: str = ""
    """A sentence about what the base does not say and was assumed."""

    @property
    def source(self) -> Path:
        """What a person knows the base by: its file, or its folder."""
        return self.checkpoint or self.folder

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise (arXiv 2305.08891)."""
        return bool(self.configs["scheduler"].get("rescale_betas_zero_snr"))

    def layers_read(self, part: str) -> int:
        """How many of a text encoder's layers anything reads; those behind them cannot learn."""
        layers = int(self.configs[part]["num_hidden_layers"])
        unread = self.family.unread.get(part)
        return layers if unread is None else layers - unread - (self.clip_skip - 1)
