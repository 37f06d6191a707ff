"""Buckets: their sizes, the nearest one, centred crops, and placing pixels."""

from __future__ import annotations

import math

import pytest
from PIL import Image

from trainers.dataset.buckets import Placement, assign_buckets, make_buckets, place

RESOLUTIONS = [(64, 32), (64, 8), (128, 32), (512, 64), (500, 64), (1024, 64), (32, 32), (32, 64)]


@pytest.mark.parametrize(("resolution", "step"), RESOLUTIONS)
def test_buckets_are_multiples_of_the_step_within_area_sides_and_aspect(resolution: int, step: int) -> None:
    buckets = make_buckets(resolution, step)
    square = max(step, resolution // step * step)
    assert (square, square) in buckets
    for height, width in buckets:
        assert height % step == width % step == 0
        assert height * width <= max(resolution, step) ** 2
        assert max(height, width) <= 4 * min(height, width)
        assert (width, height) in buckets
        if (height, width) != (square, square):
            assert resolution / 2 <= min(height, width)
            assert max(height, width) <= resolution * 2


def test_the_buckets_of_sd1_are_those_people_know() -> None:
    wide = [bucket for bucket in make_buckets(512, 64) if bucket[0] <= bucket[1]]
    long = [(256, 832), (256, 896), (256, 960), (256, 1024)]
    assert wide == [*long, (320, 704), (320, 768), (384, 640), (448, 576), (512, 512)]


def test_the_pocket_base_has_a_square_and_long_buckets_at_one_step() -> None:
    assert make_buckets(64, 32) == [(32, 96), (32, 128), (64, 64), (96, 32), (128, 32)]


@pytest.mark.parametrize(("resolution", "step"), RESOLUTIONS)
def test_each_picture_goes_to_the_bucket_that_crops_least(resolution: int, step: int) -> None:
    sizes = [(480, 640), (640, 480), (1000, 1000), (300, 3000), (1080, 1920), (17, 16), (777, 1234)]
    for (height, width), placement in zip(sizes, assign_buckets(sizes, resolution, step), strict=True):
        distances = [abs(math.log(h / w) - math.log(height / width)) for h, w in make_buckets(resolution, step)]
        chosen = abs(math.log(placement.bucket[0] / placement.bucket[1]) - math.log(height / width))
        assert chosen == pytest.approx(min(distances), abs=1e-8)


@pytest.mark.parametrize("size", [(480, 640), (33, 1999), (1999, 33), (16, 16), (64, 64), (100, 101), (10_000, 9_999)])
def test_the_picture_covers_its_bucket_and_the_crop_is_centred(size: tuple[int, int]) -> None:
    (placement,) = assign_buckets([size], 64, 8)
    height, width = placement.bucket
    left, top, right, bottom = placement.crop
    assert (bottom - top, right - left) == (height, width)
    assert placement.resized[0] >= height
    assert placement.resized[1] >= width
    assert height == placement.resized[0] or width == placement.resized[1]
    assert 0 <= placement.resized[0] - bottom - top <= 1
    assert 0 <= placement.resized[1] - right - left <= 1


def test_a_picture_shaped_like_its_bucket_loses_nothing() -> None:
    (placement,) = assign_buckets([(1024, 1024)], 512, 64)
    assert placement == Placement((512, 512), (512, 512), (0, 0, 512, 512), 1.0)
    assert placement.cropped == 0.0


def test_a_small_picture_says_by_how_much_it_is_enlarged() -> None:
    small, large = assign_buckets([(128, 128), (700, 700)], 512, 64)
    assert small.enlarged == 4.0
    assert large.enlarged == 1.0


def test_without_buckets_everything_is_cropped_to_the_square() -> None:
    placements = assign_buckets([(100, 400), (400, 100), (64, 64)], 64, 8, enabled=False)
    assert {placement.bucket for placement in placements} == {(64, 64)}
    assert placements[0].resized == (64, 256)
    assert placements[0].crop == (96, 0, 160, 64)
    assert placements[0].cropped == pytest.approx(0.75)


def test_a_smaller_aspect_limit_leaves_out_the_long_buckets() -> None:
    assert all(max(bucket) <= 2 * min(bucket) for bucket in make_buckets(512, 64, max_aspect=2.0))


@pytest.mark.parametrize(("size", "resolution", "step"), [((0, 5), 64, 8), ((5, 5), 0, 8), ((5, 5), 64, 0)])
def test_sizes_without_meaning_are_refused(size: tuple[int, int], resolution: int, step: int) -> None:
    with pytest.raises(ValueError, match="0"):
        assign_buckets([size], resolution, step)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (30, 3000), (500, 501), (16, 20_000)])
def test_a_placed_picture_has_exactly_its_buckets_size(size: tuple[int, int]) -> None:
    (placement,) = assign_buckets([size], 64, 8)
    placed = place(Image.new("RGB", (size[1], size[0]), "red"), placement, flip=False)
    assert (placed.height, placed.width) == placement.bucket
    assert placed.getpixel((0, 0)) == (255, 0, 0)


def test_placing_equals_scaling_the_whole_picture_and_cropping() -> None:
    image = Image.effect_noise((300, 200), 80).convert("RGB")
    (placement,) = assign_buckets([(200, 300)], 64, 32)
    height, width = placement.resized
    whole = image.resize((width, height), Image.Resampling.LANCZOS).crop(placement.crop)
    placed = place(image, placement, flip=False)
    difference = max(abs(a - b) for a, b in zip(placed.tobytes(), whole.tobytes(), strict=True))
    assert difference <= 1


def test_a_flip_mirrors_left_and_right() -> None:
    image = Image.linear_gradient("L").rotate(90).convert("RGB")
    (placement,) = assign_buckets([(256, 256)], 64, 8)
    plain, flipped = place(image, placement, flip=False), place(image, placement, flip=True)
    assert plain.tobytes() != flipped.tobytes()
    assert plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes() == flipped.tobytes()
