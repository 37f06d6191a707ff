"""The loop that a plain diffusers + peft script runs, rebuilt from their public APIs alone: what is measured against.

Each step reads and encodes its pictures, encodes their captions, runs the UNet with peft's LoRA layers, and ends with
clipping, torch's AdamW, a scheduler and zero_grad. In bf16 all frozen weights are cast, and peft's layers with them.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TOKENS = 77

Encoded = tuple[torch.Tensor, torch.Tensor, dict[str, Any]]
"""Moments of the latents' distribution (B, 2C, h, w), text states (B, 77, width), and what else the UNet's call names."""


@dataclass(frozen=True)
class Parts:
    """A base as diffusers and transformers load it, frozen. Two text encoders and tokenizers for SDXL."""

    unet: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Any

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        dtype: torch.dtype = self.unet.dtype
        return dtype


@dataclass(frozen=True)
class Recipe:
    """What the loop is told; the numbers are those of the project's own settings."""

    pictures: tuple[tuple[Path, str], ...]
    resolution: int
    batch: int
    rank: int
    rate: float
    seed: int = 0


@dataclass(frozen=True)
class Inputs:
    """What a step feeds the UNet and compares its answer with. `text` and `extras` as the UNet's call names them."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    text: torch.Tensor
    extras: dict[str, Any]


def load_parts(base: Path, dtype: torch.dtype, device: torch.device) -> Parts:
    """Reads a folder in diffusers layout, as scripts do, but without bars and remarks."""
    diffusers, transformers = importlib.import_module("diffusers"), importlib.import_module("transformers")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    texts, tokenizers = [], []
    for number, kind in (("", "CLIPTextModel"), ("_2", "CLIPTextModelWithProjection")):
        if (base / f"text_encoder{number}").is_dir():
            texts.append(getattr(transformers, kind).from_pretrained(base, subfolder=f"text_encoder{number}", dtype=dtype))
            tokenizers.append(_tokenizer(transformers.CLIPTokenizer, base / f"tokenizer{number}"))
    vae = diffusers.AutoencoderKL.from_pretrained(base, subfolder="vae")
    unet = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=dtype)
    scheduler = diffusers.DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    if len(texts) == 1:  # SDXL's scripts leave the VAE in float32, as it overflows
        vae.to(dtype=dtype)
    for module in (unet, vae, *texts):
        module.requires_grad_(False)
        module.to(device)
    return Parts(unet, vae, tuple(texts), tuple(tokenizers), scheduler)


def _tokenizer(kind: Any, folder: Path) -> Any:
    if (folder / "vocab.json").is_file():
        return kind.from_pretrained(folder)
    from trainers.families.vocabulary import number_words, read_merges  # pocket's follows from its merges

    merges = read_merges(folder)
    return kind(vocab=number_words(merges), merges=merges, model_max_length=TOKENS)


def share(module: Any, device: str | None = None, trainable: bool = False) -> Any:
    """A copy of a module whose weights are the same memory; with `device` (meta) copies of them there."""

    def alias(tensor: torch.Tensor) -> torch.Tensor:
        data = tensor.detach() if device is None else tensor.detach().to(device)
        return nn.Parameter(data, requires_grad=trainable) if isinstance(tensor, nn.Parameter) else data

    memo = {id(tensor): alias(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


class Reference:
    """The loop. With `cached`, latents' distributions and text states are encoded once and kept."""

    def __init__(self, parts: Parts, recipe: Recipe, cached: bool = False) -> None:
        peft, optimization = importlib.import_module("peft"), importlib.import_module("diffusers.optimization")
        self.parts, self.recipe, self.cached = parts, recipe, cached
        self.unet = share(parts.unet)
        self.unet.add_adapter(
            peft.LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, init_lora_weights="gaussian", target_modules=TARGETS)
        )
        self.unet.train()
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=recipe.rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        self.schedule = optimization.get_scheduler("constant", self.optimizer)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.kept: dict[int, Encoded] = {}

    def step(self, number: int) -> float:
        """One optimizer update, everything in it. Returns the loss."""
        return self.update(self.inputs(number))

    def update(self, inputs: Inputs) -> float:
        """The part after encoding. Returns the loss."""
        loss = self.loss(inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def loss(self, inputs: Inputs) -> torch.Tensor:
        """Mean of squared errors of the UNet's answer, a scalar."""
        return denoising_loss(self.unet, self.parts.scheduler, inputs)

    def inputs(self, number: int) -> Inputs:
        """Of step `number`: its pictures in turn, noise and timesteps drawn anew."""
        distribution = importlib.import_module("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution
        count = len(self.recipe.pictures)
        chosen = [(number * self.recipe.batch + slot) % count for slot in range(self.recipe.batch)]
        moments, text, extras = _joined([self.keep(index) for index in chosen]) if self.cached else self.encode(chosen)
        latents = (distribution(moments).sample() * self.parts.vae.config.scaling_factor).to(self.parts.dtype)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(self.parts.scheduler.config.num_train_timesteps, (len(chosen),), generator=self.generator)
        return Inputs(latents, noise, timesteps.to(latents.device), text, extras)

    def keep(self, index: int) -> Encoded:
        """A picture's numbers, encoded the first time."""
        if index not in self.kept:
            self.kept[index] = self.encode([index])
        return self.kept[index]

    @torch.no_grad()
    def encode(self, chosen: Sequence[int]) -> Encoded:
        """Moments of the latents, text states and further inputs of some pictures, as one batch."""
        rows = [self.recipe.pictures[index] for index in chosen]
        pixels = torch.cat([read_pixels(path, self.recipe.resolution) for path, _ in rows])
        answer = self.parts.vae.encode(pixels.to(self.parts.vae.device, self.parts.vae.dtype))
        return (answer.latent_dist.parameters, *self.encode_captions([caption for _, caption in rows]))

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Text states (B, 77, width), and for SDXL the pooled states and the sizes."""
        answers = []
        two = len(self.parts.text_encoders) == 2
        for tokenizer, encoder in zip(self.parts.tokenizers, self.parts.text_encoders, strict=True):
            words = tokenizer(list(captions), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
            answers.append(encoder(words.input_ids.to(encoder.device), output_hidden_states=two))
        if not two:
            return answers[0].last_hidden_state, {}
        side = self.recipe.resolution
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * len(captions), device=self.parts.unet.device)
        states = torch.cat([answer.hidden_states[-2] for answer in answers], dim=-1)
        return states, {"text_embeds": answers[1].text_embeds, "time_ids": sizes.to(self.parts.dtype)}


def denoising_loss(unet: Any, scheduler: Any, inputs: Inputs) -> torch.Tensor:
    """Mean of squared errors, a scalar, as the scripts compute it."""
    noisy = scheduler.add_noise(inputs.latents, inputs.noise, inputs.timesteps).to(unet.dtype)
    extras = {"added_cond_kwargs": inputs.extras} if inputs.extras else {}
    answer = unet(noisy, inputs.timesteps, encoder_hidden_states=inputs.text, return_dict=False, **extras)[0]
    kind = scheduler.config.prediction_type
    target = inputs.noise if kind == "epsilon" else scheduler.get_velocity(inputs.latents, inputs.noise, inputs.timesteps)
    return F.mse_loss(answer.float(), target.float(), reduction="mean")


def read_pixels(path: Path, resolution: int) -> torch.Tensor:
    """(1, 3, side, side) in [-1, 1]: scaled by the shorter side, the middle cut out."""
    import numpy
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        fitted = ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.BILINEAR)
    return torch.from_numpy(numpy.asarray(fitted).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def read_recipe(images: Path, resolution: int, batch: int, rank: int, rate: float) -> Recipe:
    """The recipe for a folder of PNGs with captions beside them."""
    paths = sorted(images.glob("*.png"))
    pictures = tuple((path, path.with_suffix(".txt").read_text(encoding="utf-8").strip()) for path in paths)
    return Recipe(pictures, resolution, batch, rank, rate)


def _joined(rows: Sequence[Encoded]) -> Encoded:
    extras = {key: torch.cat([extra[key] for _, _, extra in rows]) for key in rows[0][2]}
    return torch.cat([moments for moments, _, _ in rows]), torch.cat([text for _, text, _ in rows]), extras
