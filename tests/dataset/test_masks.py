"""Masks: whose they are, what cannot be one, the same placement as the picture's, and no influence of what they hide."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from tests.command_line import TINY, impasto, read_events
from tests.recorder import recorder
from tests.tiny_runs import shake, tiny_training
from trainers.dataset.buckets import assign_buckets, place
from trainers.dataset.folder import Scan, scan_folder
from trainers.dataset.masks import cells_of, load_masked
from trainers.errors import DatasetError
from trainers.graph import Graphed
from trainers.manifest import make_manifest
from trainers.objective import mean_of_squares
from trainers.run_folder import RunFolder
from trainers.setup import Training
from trainers.train import fill_gradient, update


def write_mask(path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    """A mask that shows `box` (left, top, right, bottom) alone."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    path.parent.mkdir(exist_ok=True)
    mask.save(path)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def middle(path: Path) -> tuple[int, int, int, int]:
    width, height = size_of(path)
    return width // 4, height // 4, 3 * width // 4, 3 * height // 4


def mask_all(pictures: Path, name: str = "{}-masklabel.png") -> None:
    for path in sorted(pictures.glob("0?.png")):
        write_mask(pictures / name.format(path.stem), size_of(path), middle(path))


def masked(scan: Scan) -> dict[str, str]:
    return {example.name: example.mask.path.name if example.mask.path else "alpha" for example in scan.examples if example.mask}


def said(scan: Scan) -> dict[str, str]:
    return {problem.where: problem.what for problem in scan.problems}


@pytest.mark.parametrize("name", ["{}-masklabel.png", "{}.mask.png", "masks/{}.png", "{}-MASKLABEL.PNG"])
def test_a_mask_file_belongs_to_its_picture_and_is_none_itself(pictures: Path, name: str) -> None:
    before = [example.name for example in scan_folder(pictures).examples]
    mask_all(pictures, name)
    for setting in ("off", "files", "auto"):
        scan = scan_folder(pictures, masks=setting)
        assert [example.name for example in scan.examples] == before
        assert len(masked(scan)) == (0 if setting == "off" else 6)
    assert said(scan_folder(pictures))[""].startswith("Mask files that are not used: 6")


def test_a_folder_of_pictures_called_masks_is_one_of_pictures(pictures: Path) -> None:
    (pictures / "masks").mkdir()
    (pictures / "00.png").rename(pictures / "masks" / "venice.png")
    assert "masks/venice.png" in [example.name for example in scan_folder(pictures, masks="auto").examples]


def test_a_mask_of_nothing_is_told(pictures: Path) -> None:
    write_mask(pictures / "gone-masklabel.png", (48, 48), (0, 0, 9, 9))
    scan = scan_folder(pictures, masks="files")
    assert said(scan)["gone-masklabel.png"] == "A mask without a picture; ignored" and len(scan.examples) == 6


def test_alpha_is_a_mask_where_it_is_asked_for(pictures: Path) -> None:
    with Image.open(pictures / "00.png") as image:
        cut = image.convert("RGBA")
    cut.putalpha(Image.new("L", cut.size, 0))
    cut.paste((255, 0, 0, 255), (8, 8, 24, 24))
    cut.save(pictures / "00.png")
    whole = Image.new("RGBA", (48, 48), (9, 9, 9, 255))
    whole.save(pictures / "01.png")
    assert masked(scan_folder(pictures)) == {} == masked(scan_folder(pictures, masks="files"))
    assert masked(scan_folder(pictures, masks="alpha")) == {"00.png": "alpha"}, "a whole one masks nothing"
    write_mask(pictures / "00.mask.png", cut.size, (0, 0, 8, 8))
    assert masked(scan_folder(pictures, masks="auto")) == {"00.png": "00.mask.png"}
    assert masked(scan_folder(pictures, masks="alpha")) == {"00.png": "alpha"}


def test_a_mask_drawn_white_on_a_clear_layer_shows_what_is_drawn(pictures: Path) -> None:
    size = size_of(pictures / "00.png")
    drawn = Image.new("RGBA", size, (255, 255, 255, 0))
    drawn.paste((255, 255, 255, 128), (8, 8, 24, 24))
    drawn.save(pictures / "00.mask.png")
    scan = scan_folder(pictures, masks="files")
    assert masked(scan) == {"00.png": "00.mask.png"}
    (example,) = (example for example in scan.examples if example.mask)
    assert example.mask is not None
    grey = load_masked(example.path, example.mask, example.sha256)[1]
    assert grey.getpixel((9, 9)) == 128 and grey.getpixel((30, 30)) == 0


def test_a_mask_file_that_hides_nothing_is_told(pictures: Path) -> None:
    Image.new("L", size_of(pictures / "00.png"), 255).save(pictures / "00.mask.png")
    scan = scan_folder(pictures, masks="files")
    assert masked(scan) == {} and len(scan.examples) == 6
    assert said(scan)["00.png"] == "Its mask 00.mask.png hides nothing; all of the picture is learnt"
    assert "00.png" not in said(scan_folder(pictures))


def test_what_cannot_be_a_mask_is_told_and_its_picture_left_out(pictures: Path) -> None:
    write_mask(pictures / "00.mask.png", (48, 48), (0, 0, 0, 0))
    write_mask(pictures / "01.mask.png", (48, 64), (0, 0, 9, 9))
    (pictures / "02.mask.png").write_bytes(b"no picture")
    Image.new("RGBA", (48, 48), (9, 9, 9, 0)).save(pictures / "03.png")
    Image.new("L", (640, 640), 255).save(pictures / "04.mask.png")  # of another size, but the same shape
    scan = scan_folder(pictures, masks="auto")
    assert [example.name for example in scan.examples] == ["04.png", "05.png"] and masked(scan) == {}
    words = said(scan)
    assert words["00.png"].startswith("Its mask is empty") and words["03.png"].startswith("Its alpha channel is empty")
    assert words["01.png"] == "Its mask 01.mask.png has another shape: 48x64 for 64x48; left out"
    assert "not a picture" in words["02.png"]


@pytest.mark.parametrize("flip", [False, True])
def test_a_mask_lies_where_its_picture_lies(flip: bool) -> None:
    """A picture that is white where its mask is: in the bucket, scaled, cropped and mirrored, both show the same places."""
    picture = Image.new("L", (200, 90))
    picture.paste(255, (20, 30, 90, 80))
    (placement,) = assign_buckets([(90, 200)], 64, 8)
    shown = numpy.asarray(place(picture, placement, flip), dtype=numpy.float32) / 255
    height, width = placement.bucket
    cells = shown.reshape(height // 8, 8, width // 8, 8).mean((1, 3))
    found = cells_of(picture, placement, flip, (height // 8, width // 8))
    assert found.shape == cells.shape and found.dtype == numpy.float32
    assert abs(found - cells).max() < 0.04 and 0 <= found.min() < found.max() <= 1
    assert abs(found - cells[:, ::-1]).max() > 0.5


def test_a_crop_that_leaves_nothing_of_the_mask_is_told() -> None:
    mask = Image.new("L", (400, 64))
    mask.paste(255, (0, 0, 9, 64))
    (placement,) = assign_buckets([(64, 400)], 64, 8, enabled=False)
    with pytest.raises(DatasetError, match="crop leaves nothing"):
        cells_of(mask, placement, False, (8, 8))


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8))


def gradient_of(training: Training) -> tuple[float, torch.Tensor]:
    shake(training)
    loss, _ = fill_gradient(training)
    return loss, training.flat.gradient.clone()


@pytest.mark.parametrize("kind", ["files", "alpha"])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_pixels_outside_a_mask_have_no_influence_on_the_gradient(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    """Two folders whose pictures differ on one side of the masks' edges: bit for bit the same gradient, or another one.

    The names of files decide about nothing, but the hashes of their bytes do (the noise is drawn by place, not by hash).
    """
    masks = [(3, 5, 17, 29), (0, 0, 30, 9), (11, 20, 12, 21)]
    found = []
    for other in (False, True):
        folder = tmp_path / str(other)
        folder.mkdir()
        for number, box in enumerate(masks):
            size = (48, 40)
            picture, changed = noise(size, number), noise(size, 50 + number)
            shown = Image.new("L", size)
            shown.paste(255, box)
            if other:
                picture = Image.composite(picture, changed, shown if where == "outside" else Image.new("L", size))
            if kind == "files":
                shown.save(folder / f"{number}-masklabel.png")
            else:
                picture.putalpha(shown)
            picture.save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text("a thing")
        words = (f"dataset.masks={kind}", "train.batch_size=3", "dataset.flip=true")
        training = tiny_training(tiny_base, folder, tmp_path / f"run-{other}", *words)
        (batch,) = training.batches.step(0)
        assert batch.mask is not None and batch.mask.shape == (3, 1, *batch.latents.shape[2:])
        assert torch.allclose(batch.mask.mean((1, 2, 3)), torch.ones(3))
        found.append(gradient_of(training))
    (loss, gradient), (other_loss, other_gradient) = found
    assert gradient.abs().max() > 0
    assert (loss == other_loss) == (where == "outside")
    assert torch.equal(gradient, other_gradient) == (where == "outside")


def test_the_loss_is_the_mean_over_what_is_shown() -> None:
    prediction, target = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, :, 2:4, 1:5], mask[1] = 1.0, 1.0
    weight = torch.tensor([0.7, 1.3])
    found = mean_of_squares(prediction, target, weight, mask / mask.mean((2, 3), keepdim=True))
    squares = (prediction - target).square()
    expected = torch.stack([squares[0, :, 2:4, 1:5].mean(), squares[1].mean()]) * weight
    assert torch.allclose(found, expected)


def test_without_masks_nothing_is_computed_otherwise(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    """No mask reaches the step; a mask that shows all is none; and one of ones beside others changes no bit."""
    plain = tiny_training(tiny_base, pictures, tmp_path / "plain", "train.batch_size=6")
    expected = gradient_of(plain)
    assert next(plain.batches.step(0)).mask is None
    for path in sorted(pictures.glob("0?.png")):
        Image.new("L", size_of(path), 255).save(pictures / f"{path.stem}-masklabel.png")
    whole = tiny_training(tiny_base, pictures, tmp_path / "whole", "train.batch_size=6", "dataset.masks=files")
    assert next(whole.batches.step(0)).mask is None
    whole.batches._masked = True  # as in a run in which another picture has one
    (batch,) = whole.batches.step(0)
    assert batch.mask is not None and bool((batch.mask == 1).all())
    for found in (gradient_of(whole), gradient_of(tiny_training(tiny_base, pictures, tmp_path / "off", "train.batch_size=6"))):
        assert found[0] == expected[0] and torch.equal(found[1], expected[1])


def test_a_recorded_step_reads_the_mask_of_each_batch(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    mask_all(pictures)
    (pictures / "00-masklabel.png").unlink()  # one without
    words = ("dataset.masks=files", "train.batch_size=2", "optimizer.learning_rate=1e-3")
    usual, other = (tiny_training(tiny_base, pictures, tmp_path / name, *words) for name in ("usual", "other"))
    told: list[str] = []
    other.runner = runner = Graphed(recorder(other.flat.gradient), told.append)
    for training in (usual, other):
        shake(training)
    assert [update(usual) for _ in range(6)] == [update(other) for _ in range(6)]
    assert torch.equal(usual.flat.weights, other.flat.weights)
    assert not told and len(runner._recorded) == 1


def test_a_mask_is_part_of_what_went_into_a_run(pictures: Path, tmp_path: Path, tiny_base: Path) -> None:
    mask_all(pictures)
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    words = ("--base", tiny_base, *TINY, "--set", "dataset.masks=files", "--steps", 4)
    assert impasto("train", pictures, "--output", run, *words) == 3
    write_mask(pictures / "03-masklabel.png", (64, 64), (0, 0, 20, 20))
    assert impasto("resume", run) == 1
    assert "the mask of 03.png has changed" in read_events(run)[-1]["message"]
    training = tiny_training(tiny_base, pictures, tmp_path / "again", "dataset.masks=files")
    scan = scan_folder(pictures, masks="files")
    listed: dict[str, Any] = make_manifest(training.config, scan, training.model, training.device)["masks"]
    assert listed["03.png"] == hashlib.sha256((pictures / "03-masklabel.png").read_bytes()).hexdigest() and len(listed) == 6
    assert "masks" not in make_manifest(training.config, scan_folder(pictures), training.model, training.device)
    assert RunFolder(run).manifest.is_file()


def test_a_mask_that_changes_while_it_trains_is_told(start: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask_all(pictures)
    training = start("dataset.masks=files", "train.batch_size=6")
    told: list[str] = []
    training.batches._warn = told.append
    write_mask(pictures / "02-masklabel.png", (48, 64), (0, 0, 20, 20))
    assert len(list(training.batches.step(0))) == 1
    assert len(told) == 1 and "was changed" in told[0] and "02.png" in told[0]


def test_a_picture_kept_aside_is_judged_by_its_mask(start: Any, pictures: Path) -> None:
    """Also where it is the only one that has one."""
    write_mask(pictures / "03-masklabel.png", (64, 64), (0, 0, 20, 20))
    training = start("dataset.masks=files")
    aside = [prepared for prepared in training.data.training if prepared.example.name == "03.png"]
    training.batches._masked = False
    (batch,) = training.batches.held_out(aside)
    assert batch.mask is not None and batch.mask.shape[0] == 4 and batch.mask.max() > 2
