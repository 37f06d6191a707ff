"""What a run renders: the side of its samples and prior pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainers.config import build_config
from trainers.dataset.prepare import render_side
from trainers.families import recognise_base


@pytest.mark.parametrize(("resolution", "side"), [(None, 64), (64, 64), (100, 96), (111, 96), (112, 112), (40, 32), (33, 32)])
def test_a_run_renders_at_its_resolution_in_whole_steps_of_the_base(resolution: int | None, side: int) -> None:
    base = replace(recognise_base("pocket"), resolution=64, step=16)
    assert render_side(build_config({"dataset": {"resolution": resolution}}), base) == side


def test_a_run_below_the_smallest_side_renders_at_that() -> None:
    base = replace(recognise_base("pocket"), resolution=64, step=64)
    assert render_side(build_config({"dataset": {"resolution": 40}}), base) == 64
