"""Six kills, one in each stage; the long form is `python -m tests.torture --kills 200`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.torture import STAGES, torture


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_run_killed_in_every_stage_ends_with_the_same_bytes(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    hit = torture(len(STAGES), str(tiny_base), pictures, tmp_path, steps=22)
    assert set(hit) == set(STAGES)
