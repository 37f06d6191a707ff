"""The report on a style LoRA: how far pictures at each strength went towards the style, and what is left of the subject.

    python -P -m trainers.measures.report --pictures FOLDER --labels FILE --base-set FOLDER --truth FOLDER [--json FILE]

Judged beside them, as ceilings: the true pictures of the style, and the same after the base model's VAE, which is the best that
any LoRA on that base can draw.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from trainers.errors import BaseModelError, DatasetError, TrainingError
from trainers.measures.colour import mean_saturation
from trainers.measures.outline import outline_share
from trainers.measures.pixels import read_pixels
from trainers.measures.recognition import (
    EfficientNetLite0,
    Features,
    Gallery,
    cosine,
    features,
    gallery_images,
    load_judge,
    make_gallery,
    ranks,
    top_share,
)
from trainers.measures.style import early_features, style_distance

PICTURE_NAME = re.compile(r"(\d+)_s(-?\d+(?:\.\d+)?)\.png")
"""A rendered picture's name: number of the prompt, strength."""


@dataclass(frozen=True)
class Row:
    """What was measured on one set of pictures, one a label. All are means over the pictures unless said."""

    name: str
    """`strength 1.00`, `truth` or `truth through the VAE`."""
    pictures: int
    outline: float
    """Outline share, 0..1."""
    outline_median: float
    saturation: float
    """Saturation of the object, 0..1."""
    top1: float
    """Share of pictures whose own concept is the nearest of the list."""
    top5: float
    """Share of pictures whose own concept is among the nearest five."""
    cosine: float
    """Centred cosine to the true picture of the same concept, -1..1."""
    distance: float
    """Distance of the pictures' style, as a set, from that of the true pictures: trainers.measures.style."""


def read_labels(path: Path) -> list[str]:
    """Labels of a text file, one a line; empty lines are left out."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_picture(path: Path) -> Image.Image:
    """A picture as it is judged: RGB, alpha kept for the measures to put on white. Raises DatasetError when it is missing."""
    if not path.is_file():
        raise DatasetError("A picture is missing", where=str(path), hint="Render it, or leave its label out of the list.")
    with Image.open(path) as image:
        image.load()
        return image


def read_truth(folder: Path, labels: Sequence[str]) -> list[Image.Image]:
    """The true picture of every label, `<label with dashes>.png`. Raises DatasetError when one is missing."""
    return [read_picture(folder / f"{label.replace(' ', '-')}.png") for label in labels]


def read_strengths(folder: Path, labels: Sequence[str]) -> dict[float, list[Image.Image]]:
    """Pictures by strength, in the order of the labels, of a folder written by `impasto generate --output FOLDER/`.

    Numbers past the labels are left out. Raises DatasetError when there is no such picture, or a strength lacks one.
    """
    found: dict[float, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := PICTURE_NAME.fullmatch(path.name):
            found.setdefault(float(match[2]), {})[int(match[1])] = path
    if not found:
        raise DatasetError("No picture named like 000_s1.00.png", where=str(folder), hint="Write them with impasto generate.")
    for strength, paths in found.items():
        missing = [label for number, label in enumerate(labels) if number not in paths]
        if missing:
            raise DatasetError(
                f"Strength {strength:.2f} lacks {len(missing)} of {len(labels)} pictures (first: {missing[0]})",
                where=str(folder),
                hint="Render one prompt a label, in the order of the list.",
            )
    return {strength: [read_picture(found[strength][number]) for number in range(len(labels))] for strength in sorted(found)}


def through_vae(images: Sequence[Image.Image], folder: Path) -> list[Image.Image]:
    """Pictures encoded and decoded by the VAE in `folder` (diffusers layout, float32) at its native size.

    The mean of the latent distribution is decoded, so nothing is drawn. Raises BaseModelError when there is no VAE.
    """
    if not (folder / "config.json").is_file():
        raise BaseModelError("There is no VAE", where=str(folder), hint="Name the base's vae folder with --vae.")

    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, local_files_only=True).float().eval()
    side = int(vae.config.sample_size)
    decoded = []
    for image in images:
        pixels = torch.from_numpy(read_pixels(image, side) / 127.5 - 1.0).float().permute(2, 0, 1)[None]  # (1, 3, H, W), -1..1
        with torch.inference_mode():
            drawn = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        values = ((drawn[0].permute(1, 2, 0) + 1.0) * 127.5).round().clamp(0, 255)
        decoded.append(Image.fromarray(values.numpy().astype(np.uint8)))
    return decoded


def measure(
    name: str,
    images: Sequence[Image.Image],
    labels: Sequence[str],
    truth: Features,
    gallery: Gallery,
    judge: EfficientNetLite0,
    styles: tuple[Features, Features],
) -> Row:
    """One row of the report; `truth` holds the features (N, 1280) of the true pictures, in the order of the labels.

    styles: early features of the true pictures and of the base set's, for the distance.
    """
    raw = features(images, judge)
    places = ranks(raw, labels, gallery)
    outlines = [outline_share(image) for image in images]
    return Row(
        name=name,
        pictures=len(images),
        outline=float(np.mean(outlines)),
        outline_median=float(np.median(outlines)),
        saturation=float(np.mean([mean_saturation(image) for image in images])),
        top1=top_share(places, 1),
        top5=top_share(places, 5),
        cosine=float(cosine(raw, truth, gallery.centre).mean()),
        distance=style_distance(early_features(images, judge), *styles),
    )


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as a text table, one line each under a heading."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}     n  outline  (median)  saturation   top1   top5  cosine to truth  distance"]
    for row in rows:
        lines.append(
            f"{row.name:{width}}  {row.pictures:4d}  {row.outline:7.3f}  {row.outline_median:8.3f}  {row.saturation:10.3f}"
            f"  {row.top1:5.2f}  {row.top5:5.2f}  {row.cosine:15.2f}  {row.distance:8.2f}"
        )
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(prog="python -P -m trainers.measures.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pictures", type=Path, help="folder written by impasto generate; without it only the ceilings")
    parser.add_argument("--labels", type=Path, required=True, help="text file, one label a line, in the order of the prompts")
    parser.add_argument("--first", type=int, help="judge only the first so many labels")
    parser.add_argument(
        "--concepts", type=Path, default=Path("assets/pocket/build/concepts.txt"), help="concepts to choose among"
    )
    parser.add_argument("--base-set", type=Path, required=True, help="folder with captions.jsonl: what the concepts look like")
    parser.add_argument("--truth", type=Path, required=True, help="folder of true pictures, <label-with-dashes>.png")
    parser.add_argument("--vae", type=Path, default=Path("assets/pocket/vae"), help="VAE of the base model")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    return parser.parse_args(arguments)


def report(options: argparse.Namespace) -> list[Row]:
    """All rows: each strength, the truth, the truth through the VAE. Raises TrainingError kinds for what is missing."""
    labels = read_labels(options.labels)[: options.first]
    truth = read_truth(options.truth, labels)
    sets = {f"strength {s:.2f}": p for s, p in read_strengths(options.pictures, labels).items()} if options.pictures else {}
    sets |= {"truth": truth, "truth through the VAE": through_vae(truth, options.vae)}
    judge = load_judge()
    concepts = read_labels(options.concepts)
    known, concept = gallery_images(options.base_set, concepts)
    gallery = make_gallery(concepts, features(known, judge), concept)
    true_features = features(truth, judge)
    styles = early_features(truth, judge), early_features(known, judge)
    return [measure(name, images, labels, true_features, gallery, judge, styles) for name, images in sets.items()]


def main(arguments: Sequence[str]) -> int:
    """Prints the report and returns the exit code: 0, or what the error asks for."""
    options = parse_arguments(arguments)
    try:
        rows = report(options)
    except TrainingError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(format_rows(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
