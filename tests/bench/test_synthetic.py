"""Synthetic bases and pictures: the same bytes everywhere, read by the engine as any base, made anew only when incomplete."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import contents
from trainers.bench.synthetic import module_shapes, synthetic_base, synthetic_pictures
from trainers.dataset.folder import scan_folder
from trainers.families import ASSETS, recognise_base
from trainers.families.configuration import read_configs


def hashes(folder: Path) -> dict[str, str]:
    return {name: text.partition(" ")[0] for name, text in contents(folder).items()}


def test_a_base_has_the_same_bytes_wherever_it_is_made(tmp_path: Path) -> None:
    first, second = (Path(synthetic_base("smallest", tmp_path / name)) for name in "ab")
    assert hashes(first) == hashes(second)
    facts = recognise_base(str(first))
    assert (facts.family.name, facts.resolution, facts.prediction_type) == ("sd1", 32, "epsilon")


def test_a_complete_base_is_reused_and_an_incomplete_one_made_again(tmp_path: Path) -> None:
    base = Path(synthetic_base("smallest", tmp_path))
    before = contents(base)
    assert contents(Path(synthetic_base("smallest", tmp_path))) == before
    (base / "model_index.json").unlink()
    (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    assert hashes(Path(synthetic_base("smallest", tmp_path))) == {name: text.partition(" ")[0] for name, text in before.items()}


def test_pocket_is_the_one_that_ships(tmp_path: Path) -> None:
    assert synthetic_base("pocket", tmp_path) == "pocket"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("family", "millions"), [("sd1", 859.5), ("sdxl", 2567.5)])
def test_the_architectures_are_the_true_ones(family: str, millions: float) -> None:
    shapes = module_shapes("unet", read_configs(ASSETS / "families" / family)["unet"])
    total = 0
    for shape in shapes.values():
        size = 1
        for side in shape:
            size *= side
        total += size
    assert total / 1e6 == pytest.approx(millions, abs=0.1)


def test_pictures_are_different_captioned_and_the_same_each_time(tmp_path: Path) -> None:
    first, second = (synthetic_pictures(tmp_path / name, 4, 32) for name in "ab")
    assert hashes(first) == hashes(second)
    examples = scan_folder(first).examples
    assert len({example.sha256 for example in examples}) == 4
    assert all(example.caption.endswith("bench style") for example in examples)
