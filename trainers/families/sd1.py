"""Stable Diffusion 1.x: UNet2DConditionModel, CLIPTextModel, AutoencoderKL; also pocket, which has the same parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from trainers.errors import BaseModelError
from trainers.families import BaseModelFacts
from trainers.families.base import Conditioning
from trainers.families.targets import match_targets
from trainers.objective import Objective

TOKENS = 77
CANARY = ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407])


class StableDiffusion1:
    """A loaded Stable Diffusion 1.x. See families.base.DiffusionModel for the meaning of each method."""

    def __init__(
        self,
        facts: BaseModelFacts,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        scheduler_config: dict[str, Any],
    ) -> None:
        self.facts, self.scheduler_config = facts, scheduler_config
        self.unet, self.text_encoder, self.vae, self.tokenizer = unet, text_encoder, vae, tokenizer
        self.objective = Objective(_alphas_cumprod(scheduler_config), scheduler_config.get("prediction_type", "epsilon"))
        vae_config: Any = vae.config
        self._factor, self._shift = float(vae_config.scaling_factor), float(vae_config.shift_factor or 0.0)
        self._fingerprints: dict[str, str] = {}

    def parts(self) -> dict[str, nn.Module]:
        """unet and text_encoder."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def find_targets(self, part: str, targets: Sequence[str]) -> list[str]:
        """Paths of Linear and Conv2d layers inside the part, in module order."""
        return match_targets(part, targets, [path for path, _ in self.parts()[part].named_modules()])

    def fingerprint(self, part: str) -> str:
        """SHA-256 over names, dtypes and bytes of the part's own weights; taken before adapters are injected."""
        if part not in self._fingerprints:
            digest = hashlib.sha256()
            for name, tensor in getattr(self, part).state_dict().items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._fingerprints[part] = digest.hexdigest()
        return self._fingerprints[part]

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pixels -> mean, standard deviation of the unscaled latents, float32."""
        distribution = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return distribution.mean.float(), distribution.std.float()

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """unscaled latents -> latents."""
        return (latents - self._shift) * self._factor

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """latents -> pixels float32 in [-1, 1]."""
        unscaled = latents / self._factor + self._shift
        pixels: torch.Tensor = self.vae.decode(unscaled.to(self.vae.dtype)).sample
        return pixels.float().clamp(-1, 1)

    def encode_captions(self, captions: Sequence[str]) -> Conditioning:
        """captions -> last hidden states (B, 77, width), cut at 75 words' tokens."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        return Conditioning(self.text_encoder(tokens.to(self.text_encoder.device)).last_hidden_state)

    def predict(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """noisy latents -> epsilon or v, float32."""
        dtype = self.unet.dtype
        text_states = conditioning.hidden_states.to(noisy_latents.device, dtype)  # they may come from a cache on the CPU
        answer = self.unet(noisy_latents.to(dtype), timesteps, encoder_hidden_states=text_states, return_dict=False)
        prediction: torch.Tensor = answer[0]
        return prediction.float()

    def enable_checkpointing(self) -> None:
        """Gradient checkpointing in the UNet, where nearly all activations are."""
        self.unet.enable_gradient_checkpointing()


def load(facts: BaseModelFacts, dtype: torch.dtype, device: torch.device) -> StableDiffusion1:
    """Reads a folder in diffusers layout: UNet and text encoder in `dtype`, the VAE in float32 (it overflows in fp16).

    Raises BaseModelError when weights are missing or damaged, or when the tokenizer is not CLIP's.
    """
    folder = str(facts.folder)
    diffusers_logging.disable_progress_bar()  # bars of a tenth of a second, printed across our own
    transformers_logging.disable_progress_bar()
    try:
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, local_files_only=True)
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, local_files_only=True)
        text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True, model_max_length=TOKENS)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseModelError(
            f"The base model could not be loaded: {str(error).splitlines()[0]}", where=folder, hint="Is the folder complete?"
        ) from error
    # transformers builds an empty tokenizer without a word when its files are missing; training would learn nothing.
    if facts.family.name == "sd1" and tokenizer(CANARY[0]).input_ids != CANARY[1]:
        raise BaseModelError(
            "The tokenizer is not CLIP's", where=f"{folder}/tokenizer", hint="Copy vocab.json and merges.txt again."
        )
    parts: tuple[nn.Module, ...] = (unet, vae, text_encoder)
    for part in parts:
        part.requires_grad_(False)
        _unmap(part)
        part.to(device)
        part.eval()
    scheduler_config = json.loads((facts.folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return StableDiffusion1(facts, unet, text_encoder, vae, tokenizer, scheduler_config)


def _unmap(part: nn.Module) -> None:
    """Copies weights that are still the file on the disk: cut short by somebody, it would kill the process."""
    for tensor in (*part.parameters(), *part.buffers()):
        tensor.data = tensor.data.clone()


def _alphas_cumprod(config: dict[str, Any]) -> torch.Tensor:
    """The noise schedule's cumulative alphas (T,), by diffusers' own scheduler so that every schedule it knows works."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    alphas: torch.Tensor = DDPMScheduler.from_config(config).alphas_cumprod
    return alphas.float()
