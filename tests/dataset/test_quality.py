"""What may be wrong with a picture: blur, exposure, shape, size and likeness are found, and good folders get no remark."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from trainers.dataset.buckets import assign_buckets
from trainers.dataset.folder import Example
from trainers.dataset.pictures import load_small
from trainers.dataset.quality import Flaw, Quality, find_flaws, measure, measure_picture
from trainers.families import ASSETS

SAMPLES = ASSETS / "samples"


def example(name: str, size: tuple[int, int] = (64, 64), sha256: str = "") -> Example:
    return Example(Path(name), name, "", "file", size[0], size[1], 1, sha256 or name)


def qualities_of(folder: Path) -> tuple[list[Example], list[Quality | None]]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".webp"))
    return [example(path.name, (128, 128)) for path in paths], [measure_picture(path) for path in paths]


@pytest.mark.parametrize("name", ["blackcut", "inkline", "bluebot"])
def test_a_good_folder_gets_no_remark_and_a_blurred_picture_in_it_one(name: str) -> None:
    examples, qualities = qualities_of(SAMPLES / name)
    assert len(examples) >= 12
    # The robot's steps are drawn twice over; nothing else is alike.
    assert [flaw for flaw in find_flaws(examples, qualities, []) if "walk" not in flaw.pictures[0]] == []
    path = next(path for path in sorted((SAMPLES / name).rglob(examples[3].name)))
    blurred = measure(load_small(path, 512).filter(ImageFilter.GaussianBlur(2)))
    qualities[3] = dataclasses.replace(blurred, look=b"")
    (flaw,) = (flaw for flaw in find_flaws(examples, qualities, []) if flaw.kind != "alike")
    assert (flaw.kind, flaw.pictures) == ("blurred", (examples[3].name,))


def test_exposure_is_told_only_where_it_is_unlike_the_folder() -> None:
    examples = [example(str(number)) for number in range(6)]
    white = [Quality(10, 0, 0.7, b"") for _ in examples]
    assert find_flaws(examples, [*white], []) == []
    odd: list[Quality | None] = [*white[:4], Quality(10, 0.5, 0.7, b""), Quality(10, 0, 0.96, b"")]
    assert [(flaw.kind, flaw.pictures) for flaw in find_flaws(examples, odd, [])] == [("dark", ("4",)), ("bright", ("5",))]
    assert find_flaws(examples[:3], odd[3:], []) == []  # too few to say what is usual
    assert find_flaws(examples, [None] * 6, []) == []


def test_clipped_shares_are_counted() -> None:
    image = Image.new("RGB", (100, 100), (128, 128, 128))
    image.paste((0, 0, 0), (0, 0, 100, 30))
    image.paste((255, 255, 255), (0, 90, 100, 100))
    found = measure(image)
    assert (found.dark, found.bright) == (pytest.approx(0.3), pytest.approx(0.1))
    assert measure(Image.new("RGB", (2, 2))).sharpness == 0


def test_shapes_far_from_the_others_too_small_and_cut_are_told() -> None:
    sizes = [(100, 100), (110, 100), (100, 110), (100, 100), (100, 190), (1000, 100), (20, 20)]
    examples = [example(str(number), size) for number, size in enumerate(sizes)]
    placements = assign_buckets([(height, width) for width, height in sizes], 64, 8)
    flaws = find_flaws(examples, [None] * len(sizes), placements)
    assert [(flaw.kind, flaw.pictures) for flaw in flaws] == [("small", ("6",)), ("shape", ("4",)), ("shape", ("5",))]
    assert "taller" in flaws[1].reason and "cut off" in flaws[2].reason


def test_pictures_that_are_alike_come_in_one_group_and_the_same_file_in_another(tmp_path: Path) -> None:
    paths = sorted((SAMPLES / "blackcut").glob("*.png"))[:3]
    with Image.open(paths[0]) as image:
        image.convert("RGB").resize((90, 90)).save(tmp_path / "small.png")
        image.convert("RGB").save(tmp_path / "again.jpg", quality=80)
    files = [*paths, tmp_path / "small.png", tmp_path / "again.jpg"]
    examples = [example(path.name) for path in files] + [example("copy", sha256=paths[1].name)]
    qualities: list[Quality | None] = [*(measure_picture(path) for path in files), measure_picture(paths[1])]
    flaws = [flaw for flaw in find_flaws(examples, qualities, []) if flaw.kind in ("same", "alike")]
    assert flaws == [
        Flaw("same", (paths[1].name, "copy"), flaws[0].reason),
        Flaw("alike", (paths[0].name, "small.png", "again.jpg"), flaws[1].reason),
    ]
