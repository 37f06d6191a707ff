"""Captions: forms, their shares, and the same caption from the same generator state."""

from collections import Counter

import pytest
import torch

from assets.pocket.build.captions import caption, with_article


@pytest.mark.parametrize(
    ("label", "wanted"),
    [("cat", "a cat"), ("owl", "an owl"), ("Umbrella", "an Umbrella"), ("unicorn", "a unicorn")],
)
def test_article(label: str, wanted: str) -> None:
    assert with_article(label) == wanted


def test_forms_and_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = Counter(caption("owl", "noto", ("bird", "wise"), generator) for _ in range(4000))
    assert set(seen) == {
        "an owl, noto style",
        "owl, noto style",
        "an owl",
        "an owl, bird, noto style",
        "an owl, wise, noto style",
        "bird, wise, noto style",
        "wise, bird, noto style",
    }
    assert 0.45 < seen["an owl, noto style"] / 4000 < 0.55
    assert seen["bird, wise, noto style"] + seen["wise, bird, noto style"] < 0.08 * 4000


def test_missing_parts_leave_no_gap() -> None:
    generator = torch.Generator().manual_seed(1)
    assert {caption("owl", None, (), generator) for _ in range(300)} == {"an owl", "owl"}
    assert {caption("owl", "noto", ("owl",), generator) for _ in range(300)} == {
        "an owl, noto style",
        "owl, noto style",
        "an owl",
    }


def test_same_state_same_caption() -> None:
    seeds = [seed for seed in range(50) for _ in range(2)]
    drawn = [caption("owl", "noto", ("a", "b", "c"), torch.Generator().manual_seed(seed)) for seed in seeds]
    assert drawn[::2] == drawn[1::2]
