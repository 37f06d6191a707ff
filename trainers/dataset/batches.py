"""From examples to the tensors of one step. Everything random is drawn from (seed, step, slot)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch

from trainers.config import TrainConfig
from trainers.dataset.buckets import place
from trainers.dataset.cache import ContentCache, Entry, cache_key
from trainers.dataset.captions import vary_caption
from trainers.dataset.pictures import load_pixels
from trainers.dataset.plan import StepPlan, random_for
from trainers.dataset.prepare import Prepared
from trainers.device import Device
from trainers.families.base import DiffusionModel
from trainers.objective import draw_noise, draw_timestep

PREPROCESSING = 1
"""Version of what `load_pixels` and `place` make of a picture. Raise it with them: older cached latents are then unused."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one step.

    latents, noise (B, C, h, w) float32; timesteps (B,) int64; weights (B,) float32, already divided by the number of
    examples in the whole step, so that the micro-batches' (and processes') losses add up to the step's mean.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    captions: tuple[str, ...]
    weights: torch.Tensor


class BatchMaker:
    """Builds batches for any step, and the fixed batches of the held-out loss."""

    def __init__(
        self,
        model: DiffusionModel,
        config: TrainConfig,
        examples: Sequence[Prepared],
        plan: StepPlan,
        cache: ContentCache,
        device: Device,
    ) -> None:
        self._model, self._config, self._examples, self._plan = model, config, examples, plan
        self._cache, self._device = cache, device

    def step(self, step: int) -> Iterator[Batch]:
        """The micro-batches of `step` that this process computes. Slots are dealt out to the processes in turn."""
        indices = self._plan.indices(step)
        mine = list(enumerate(indices))[self._device.index :: self._device.count]
        size = self._config.train.batch_size
        for start in range(0, len(mine), size):
            rows = [self._row(step, slot, index) for slot, index in mine[start : start + size]]
            yield self._join(rows, len(indices))

    def held_out(self, examples: Sequence[Prepared], draws: int = 4) -> Iterator[Batch]:
        """One batch for each held-out example: `draws` fixed noises at timesteps spread evenly over the schedule."""
        total = self._model.objective.timesteps
        seed = self._config.train.seed
        for prepared in examples:
            rows = []
            for draw in range(draws):
                key = (seed, "holdout", prepared.example.sha256, draw)
                latents = self._latents(prepared, False, key)
                noise = draw_noise(_shape(latents), 0.0, *key)
                timestep = int(total * (draw + 0.5) / draws)
                rows.append((latents, noise, timestep, prepared.example.caption, 1.0))
            yield self._join(rows, draws * len(examples))

    def _row(self, step: int, slot: int, index: int) -> tuple[torch.Tensor, torch.Tensor, int, str, float]:
        settings, prepared = self._config.dataset, self._examples[index]
        key = (self._config.train.seed, step, slot, index)
        flip = settings.flip and random_for("flip", *key).random() < 0.5
        caption = vary_caption(
            prepared.example.caption,
            random_for("caption", *key),
            settings.caption_shuffle,
            settings.caption_keep,
            settings.caption_dropout,
        )
        latents = self._latents(prepared, flip, key)
        noise = draw_noise(_shape(latents), self._config.train.noise_offset, *key)
        return latents, noise, draw_timestep(self._model.objective.timesteps, *key), caption, prepared.weight

    def _latents(self, prepared: Prepared, flip: bool, key: tuple[object, ...]) -> torch.Tensor:
        """One draw from the VAE's distribution of a picture, (C, h, w), scaled."""
        picture = (PREPROCESSING, prepared.example.sha256, prepared.placement, flip)
        # A GPU's answer differs in the last bits from a CPU's: a run must not depend on who filled the cache.
        encoder = (self._model.fingerprint("vae"), "float32", self._device.device.type)
        name = cache_key("latents", *picture, *encoder)

        def encode() -> Entry:
            image = place(load_pixels(prepared.example.path, prepared.example.sha256), prepared.placement, flip)
            mean, deviation = self._model.encode_pixels(pixels_of(numpy.asarray(image)))
            return {"mean": mean[0], "deviation": deviation[0]}

        entry = self._cache.get(name, encode)
        draw = draw_noise(_shape(entry["mean"]), 0.0, *key, "latents")
        return self._model.scale_latents(entry["mean"] + entry["deviation"] * draw)

    def _join(self, rows: Sequence[tuple[torch.Tensor, torch.Tensor, int, str, float]], in_step: int) -> Batch:
        latents, noise, timesteps, captions, weights = zip(*rows, strict=True)
        device = self._device.device
        return Batch(
            torch.stack(latents).to(device),
            torch.stack(noise).to(device),
            torch.tensor(timesteps, device=device),
            captions,
            torch.tensor(weights, dtype=torch.float32, device=device) / in_step,
        )


def pixels_of(image: numpy.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def _shape(latents: torch.Tensor) -> tuple[int, int, int]:
    channels, height, width = latents.shape
    return channels, height, width
