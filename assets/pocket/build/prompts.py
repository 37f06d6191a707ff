"""What a finished base is asked to draw, and the true pictures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from assets.pocket.build.captions import with_article
from assets.pocket.build.pictures import Picture, read_index, read_planes, to_images, to_model
from assets.pocket.build.stage import pick_device
from trainers.errors import DatasetError
from trainers.families import load_family, recognise_base
from trainers.families.base import DiffusionModel
from trainers.generate import Picture as Drawing
from trainers.generate import RenderSettings, render
from trainers.measures.pixels import read_pixels
from trainers.measures.recognition import GALLERY_STYLES

GUIDANCE = 3.0
STEPS = 20
SEED = 3
BATCH = 16
UNSEEN_STYLE = "inkline"
"""A style word that no training caption has."""
CONCEPTS = Path(__file__).resolve().parent / "concepts.txt"
SAMPLES = Path(__file__).resolve().parents[2] / "samples"


@dataclass(frozen=True)
class Prompt:
    """A concept in a style. The true picture of both stands in the base set, unless the style is one that it lacks."""

    label: str
    style: str

    @property
    def text(self) -> str:
        """The form that half of the training captions have."""
        return f"{with_article(self.label)}, {self.style} style"


def read_concepts(base_set: Path) -> dict[str, dict[str, Picture]]:
    """Label -> style -> picture, of the labels in concepts.txt that the set has in all four gallery styles.

    Raises DatasetError when there is none.
    """
    wanted = CONCEPTS.read_text(encoding="utf-8").split("\n")[:-1]
    found: dict[str, dict[str, Picture]] = {label: {} for label in wanted}
    for picture in read_index(base_set):
        if picture.label in found and picture.style in GALLERY_STYLES:
            found[picture.label][picture.style] = picture
    whole = {label: styles for label, styles in found.items() if len(styles) == len(GALLERY_STYLES)}
    if not whole:
        raise DatasetError("No concept is there in all four styles", where=str(base_set), hint="Make the set again with fetch.")
    return whole


def choose_prompts(labels: Sequence[str], count: int, seed: int = SEED) -> list[Prompt]:
    """`count` prompts, the four styles equally often, no label twice before all were used; the same seed, the same choice."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    rounds, styles = len(order), len(GALLERY_STYLES)
    places = (divmod(number, rounds) for number in range(count))
    return [Prompt(labels[order[place]], GALLERY_STYLES[(place + turn) % styles]) for turn, place in places]


def load_base(folder: Path) -> DiffusionModel:
    """The base in diffusers layout, float32, on the GPU when there is one. Raises BaseModelError."""
    return load_family(recognise_base(str(folder)), torch.float32, pick_device())


def draw(model: DiffusionModel, prompts: Sequence[Prompt]) -> list[Image.Image]:
    """The prompts drawn with DPM++ at the base's own size, each from its own seed: its place in the list."""
    side = model.facts.resolution
    how = RenderSettings(side, side, STEPS, GUIDANCE)
    wanted = [Drawing(prompt.text, seed, {}) for seed, prompt in enumerate(prompts)]
    return [image for at in range(0, len(wanted), BATCH) for image in render(model, wanted[at : at + BATCH], how)]


def read_set(base_set: Path, pictures: Sequence[Picture], side: int) -> Tensor:
    """Pictures of the base set as (N, 3, side, side) float32 in 0..1; from 128 to 64 px each pixel is the mean of four."""
    return functional.interpolate(read_planes(base_set, list(pictures)).float() / 255, side, mode="area")


def read_sample(name: str, side: int) -> Tensor:
    """The pictures of the sample folder `name` in the order of their names, (N, 3, side, side) float32 in 0..1."""
    planes = []
    for path in sorted((SAMPLES / name).glob("*.png")):
        with Image.open(path) as image:
            planes.append(torch.from_numpy(read_pixels(image, side) / 255).float().permute(2, 0, 1))
    return torch.stack(planes)


def reconstruct(model: DiffusionModel, planes: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..1 -> the same after the base's VAE, in -1..1 on the CPU; the mean latents are decoded."""
    found = []
    for few in torch.split(to_model(planes), BATCH):
        mean, _ = model.encode_pixels(few)
        found.append(model.decode_latents(model.scale_latents(mean)).cpu())
    return torch.cat(found)


def as_images(planes: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in 0..1 -> pictures."""
    return to_images(to_model(planes))
