"""From examples to the tensors of one step. Everything random is drawn from (seed, step, slot)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image

from trainers.config import TrainConfig
from trainers.dataset.buckets import place
from trainers.dataset.cache import ContentCache, Entry, cache_key
from trainers.dataset.captions import vary_caption
from trainers.dataset.folder import Example
from trainers.dataset.masks import FILLING, cells_of, load_masked
from trainers.dataset.pictures import load_pixels, read_file
from trainers.dataset.plan import StepPlan, dropout_keys, random_for
from trainers.dataset.prepare import Prepared
from trainers.device import Device, send
from trainers.errors import DatasetError
from trainers.families.base import DiffusionModel
from trainers.objective import draw_noise, draw_timestep

PREPROCESSING = 1
"""Version of what `load_pixels` and `place` make of a picture. Raise it with them: older cached latents are then unused."""
HELD_BYTES = 64 * 2**20
"""Files of pictures are kept in memory until they are encoded where all of them together are no larger."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one step.

    latents, noise (B, C, h, w) float32; timesteps (B,) int64; weights (B,) float32, already divided by the number of
    examples in the whole step, so that the micro-batches' (and processes') losses add up to the step's mean; framing
    (B, 6) float32 as in families.base.DiffusionModel.predict; mask (B, 1, h, w) float32, of mean 1 in each example and 1
    everywhere in one without a mask, None in a run in which no picture has one; keys (B, 2) int32 as in adapters.dropout.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    captions: tuple[str, ...]
    weights: torch.Tensor
    framing: torch.Tensor
    mask: torch.Tensor | None = None
    keys: torch.Tensor | None = None


Shown = tuple[torch.Tensor, torch.Tensor | None]
"""latents (C, h, w) and mask (1, h, w) of a picture."""
Row = tuple[torch.Tensor, torch.Tensor, int, str, float, tuple[int, ...], torch.Tensor | None, tuple[int, ...]]
"""latents, noise, timestep, caption, weight, framing, mask and keys of one example."""


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
        warn: Callable[[str], None] = lambda message: None,
        at_once: int = 0,
    ) -> None:
        self._model, self._config, self._examples, self._plan = model, config, examples, plan
        self._cache, self._device, self._warn = cache, device, warn
        self.at_once = at_once or config.train.batch_size
        """Pictures in one micro-batch. Less than the batch size where memory is short; the step stays the same."""
        self._lost: set[str] = set()  # names of pictures that cannot be read any more
        self._flips = (False, True) if config.dataset.flip else (False,)
        self._files: dict[Path, bytes] = {}
        self._masked = any(prepared.example.mask for prepared in examples)
        self._drops = config.adapter.dropouts.is_on
        self._to_encode = self._encoded = 0
        self.ahead = device.device.type == "cuda"
        """Whether a step's batches are made while the device still computes the step before."""
        self._ready: tuple[int, int, list[Batch]] | None = None
        self.seconds_encoding = 0.0
        """Seconds that encoding took until now, which is no part of what steps take later."""

    def hold_pictures(self, held_out: Sequence[Prepared]) -> int:
        """Reads the files of the pictures that no cache knows yet, so that one that vanishes before its turn is not missed.

        A large folder is left on the disk. Returns how many are to be encoded, each when it is first wanted.
        """
        wanted = [(prepared, flip) for prepared in self._examples for flip in self._flips] + [(one, False) for one in held_out]
        missing = [prepared for prepared, flip in wanted if not self._cache.knows(self._name(prepared, flip))]
        self._to_encode = len(missing)
        files = {path: (sha256, one.example.name) for one in missing for path, sha256 in _files_of(one.example)}
        if sum(_size_of(path) for path in files) <= HELD_BYTES:
            for path, (sha256, name) in files.items():
                try:
                    self._files[path] = read_file(path, sha256)
                except DatasetError as error:
                    self._lose(name, error)
        return len(missing)

    def seconds_to_encode(self, showings: int) -> float:
        """Seconds that encoding will take, by what it took, if so many more pictures are shown."""
        return self.seconds_encoding / max(1, self._encoded) * min(showings, max(0, self._to_encode - self._encoded))

    def step(self, step: int) -> Iterator[Batch]:
        """The micro-batches of `step` that this process computes. Slots are dealt out to the processes in turn.

        A picture that cannot be read any more is told once, and another one of its size stands in for it. Raises
        DatasetError when none is left.
        """
        if self._ready is not None and self._ready[:2] == (step, self.at_once):
            (*_, batches), self._ready = self._ready, None
            yield from batches
        else:
            yield from self._make(step)

    def make_ready(self, step: int) -> None:
        """Makes the batches of a step that is about to come, where there is time for it: see `ahead`."""
        if self.ahead:
            with contextlib.suppress(DatasetError):  # raised when the step is asked for
                self._ready = step, self.at_once, list(self._make(step))

    def _make(self, step: int) -> Iterator[Batch]:
        indices = self._plan.indices(step)
        mine = list(enumerate(indices))[self._device.index :: self._device.count]
        size = self.at_once
        for start in range(0, len(mine), size):
            rows = [self._row(step, slot, index) for slot, index in mine[start : start + size]]
            kept = [row for row in rows if row is not None]
            if kept:
                yield self._join(kept, len(indices))

    def held_out(self, examples: Sequence[Prepared], draws: int = 4) -> Iterator[Batch]:
        """One batch for each held-out example: `draws` fixed noises at timesteps spread evenly over the schedule.

        Processes share the work: their losses add up to the mean over all examples.
        """
        total = self._model.objective.timesteps
        seed = self._config.train.seed
        for prepared in examples[self._device.index :: self._device.count]:
            rows = []
            for draw in range(draws):
                key = (seed, "holdout", prepared.example.sha256, draw)
                shown = self._try_latents(prepared, False, key)
                if shown is None:
                    continue
                latents, mask = shown
                noise = draw_noise(_shape(latents), 0.0, *key)
                timestep = int(total * (draw + 0.5) / draws)
                rows.append((latents, noise, timestep, prepared.example.caption, 1.0, framing_of(prepared, False), mask, ()))
            if rows:
                yield self._join(rows, draws * len(examples))

    def _row(self, step: int, slot: int, index: int) -> Row | None:
        """The row of a slot, or of the first one in its bucket that can be read; None when there is none."""
        bucket = self._plan.buckets[index]
        for other in (*range(index, len(self._examples)), *range(index)):
            if self._plan.buckets[other] == bucket and self._examples[other].example.name not in self._lost:
                row = self._try_row(step, slot, other)
                if row is not None:
                    return row
        if len(self._lost) >= len({prepared.example.name for prepared in self._examples}):
            raise DatasetError("No picture can be read any more", self._config.dataset.images, "Put them back, and resume.")
        return None

    def _try_row(self, step: int, slot: int, index: int) -> Row | None:
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
        shown = self._try_latents(prepared, flip, key)
        if shown is None:
            return None
        latents, mask = shown
        noise = draw_noise(_shape(latents), self._config.train.noise_offset, *key)
        timestep = draw_timestep(self._model.objective.timesteps, *key)
        keys = dropout_keys(*key) if self._drops else ()
        return latents, noise, timestep, caption, prepared.weight, framing_of(prepared, flip), mask, keys

    def _try_latents(self, prepared: Prepared, flip: bool, key: tuple[object, ...]) -> Shown | None:
        """The latents and the mask of a picture, or None, told once, when it has become unreadable."""
        try:
            return self._latents(prepared, flip, key)
        except DatasetError as error:
            self._lose(prepared.example.name, error)
            return None

    def _lose(self, name: str, error: DatasetError) -> None:
        if name not in self._lost:
            self._lost.add(name)
            self._warn(f"{error.what} ({name}). It is left out from now on; the training goes on.")

    def _name(self, prepared: Prepared, flip: bool) -> str:
        """What the cache knows a picture's latents by."""
        picture = (PREPROCESSING, prepared.example.sha256, prepared.placement, flip)
        # A GPU's answer differs in the last bits from a CPU's: a run must not depend on who filled the cache.
        where = self._device.device.type
        exact = where == "cuda" and not torch.backends.cudnn.allow_tf32
        encoder = (self._model.fingerprint("vae"), self._model.encodes_in, f"{where} exact" if exact else where)
        mask = prepared.example.mask
        masked = () if mask is None else ("masked", FILLING, mask.sha256)
        return cache_key("latents", *picture, *encoder, *masked)

    def _latents(self, prepared: Prepared, flip: bool, key: tuple[object, ...]) -> Shown:
        """One draw from the VAE's distribution of a picture, scaled, and its mask. Raises DatasetError naming the file."""

        def encode() -> Entry:
            begun, example = time.monotonic(), prepared.example
            pixels, grey = self._read(example)
            image = place(pixels, prepared.placement, flip)
            mean, deviation = self._model.encode_pixels(pixels_of(numpy.asarray(image)))
            if not bool(torch.isfinite(mean).all() and torch.isfinite(deviation).all()):
                raise DatasetError("The base's VAE gives numbers for this picture that are not finite", example.name)
            shown = {} if grey is None else {"mask": _mask_of(grey, prepared, flip, mean)}
            self._encoded, self.seconds_encoding = self._encoded + 1, self.seconds_encoding + time.monotonic() - begun
            if all(flip == other or self._cache.knows(self._name(prepared, other)) for other in self._flips):
                for path, _ in _files_of(example):
                    self._files.pop(path, None)
            return {"mean": mean[0], "deviation": deviation[0]} | shown

        entry = self._cache.get(self._name(prepared, flip), encode)
        draw = draw_noise(_shape(entry["mean"]), 0.0, *key, "latents")
        return self._model.scale_latents(entry["mean"] + entry["deviation"] * draw), entry.get("mask")

    def _read(self, example: Example) -> tuple[Image.Image, Image.Image | None]:
        """A picture's pixels, and the mask where it has one."""
        data, mask = self._files.get(example.path), example.mask
        sha256 = example.sha256 if data is None else ""
        if mask is None:
            return load_pixels(example.path, sha256, data), None
        return load_masked(example.path, mask, sha256, data, self._files.get(mask.path) if mask.path else None)

    def _join(self, rows: Sequence[Row], in_step: int) -> Batch:
        latents, noise, timesteps, captions, weights, framing, masks, keys = zip(*rows, strict=True)
        device = self._device.device
        return Batch(
            send(torch.stack(latents), device),
            send(torch.stack(noise), device),
            send(torch.tensor(timesteps), device),
            captions,
            send(torch.tensor(weights, dtype=torch.float32), device) / in_step,
            send(torch.tensor(framing, dtype=torch.float32), device),
            send(_of_mean_one(masks, latents[0]), device) if self._masked or any(mask is not None for mask in masks) else None,
            send(torch.tensor(keys, dtype=torch.int32), device) if keys[0] else None,
        )


def framing_of(prepared: Prepared, flip: bool) -> tuple[int, ...]:
    """The picture's own height and width, the crop's top and left in the scaled picture, and the bucket's height and width."""
    example, placement = prepared.example, prepared.placement
    left, top, right, _ = placement.crop
    return (example.height, example.width, top, placement.resized[1] - right if flip else left, *placement.bucket)


def pixels_of(image: numpy.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def _mask_of(grey: Image.Image, prepared: Prepared, flip: bool, mean: torch.Tensor) -> torch.Tensor:
    """A picture's mask on the grid of its latents `mean` (1, C, h, w): (1, h, w) float32 in [0, 1]."""
    return torch.from_numpy(cells_of(grey, prepared.placement, flip, (mean.shape[2], mean.shape[3])).copy())[None]


def _of_mean_one(masks: Sequence[torch.Tensor | None], latents: torch.Tensor) -> torch.Tensor:
    """(B, 1, h, w), each divided by its mean: what a mask shows of a picture weighs as much as a whole one, however small."""
    whole = torch.ones((1, *latents.shape[1:]))
    return torch.stack([whole if mask is None else mask / mask.mean() for mask in masks])


def _files_of(example: Example) -> list[tuple[Path, str]]:
    """(file, sha256) of a picture, and of its mask file."""
    mask = example.mask
    return [(example.path, example.sha256), *([(mask.path, mask.sha256)] if mask and mask.path else [])]


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # told when it is read
        return 0


def _shape(latents: torch.Tensor) -> tuple[int, int, int]:
    channels, height, width = latents.shape
    return channels, height, width
