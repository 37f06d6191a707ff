"""Checkpoints of real size are held against the families' tables by their headers alone, before torch is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.command_line import run_fresh
from tests.family_tables import table_of
from trainers.container import Entry, serialise_header
from trainers.errors import BaseModelError
from trainers.families import FAMILIES, recognise_base
from trainers.families.configuration import read_configs
from trainers.families.expected import expected_tensors
from trainers.families.facts import ASSETS
from trainers.families.ldm import part_layouts
from trainers.formats.base_file import write_base

NORM = "model.diffusion_model.middle_block.1.norm.weight"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tables_are_those_of_the_library_s_own_models(family: str) -> None:
    built = table_of(family)
    assert built.keys() == expected_tensors(family).keys()
    for part, tensors in expected_tensors(family).items():
        assert {name: list(shape) for name, shape in tensors.items()} == built[part]


def header_only(path: Path, family: str, **changes: tuple[int, ...] | None) -> Path:
    """A checkpoint of real size whose numbers are a hole in the file; `changes` of a key's shape, None to leave it out."""
    layouts = part_layouts(family, read_configs(ASSETS / "families" / family))
    shapes: dict[str, tuple[int, ...]] = {}
    for part, tensors in expected_tensors(family).items():
        for name, shape in tensors.items():
            place = layouts[part].place(name)
            assert place is not None
            whole = (3 * shape[0], *shape[1:]) if place.third >= 0 else shape
            shapes[place.key] = whole[::-1] if place.transposed else whole
    entries, end = [], 0
    for key, shape in {**shapes, **changes}.items():
        if shape is not None:
            entries.append((key, Entry("F16", shape, end, end + 2 * math.prod(shape))))
            end = entries[-1][1].end
    with path.open("wb") as file:
        header = serialise_header(entries, {})
        file.write(header)
        file.truncate(len(header) + end)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_real_size_is_recognised(family: str, tmp_path: Path) -> None:
    base = recognise_base(str(header_only(tmp_path / "real.safetensors", family)))
    assert base.family.name == family and base.resolution == {"sd1": 512, "sd2": 768, "sdxl": 1024}[family]


def test_what_it_lacks_is_told_without_torch(tmp_path: Path) -> None:
    path = header_only(tmp_path / "real.safetensors", "sd1", **{NORM: None})
    code = (
        "import json, sys\nfrom trainers.errors import BaseModelError\nfrom trainers.families import recognise_base\n"
        "try:\n    recognise_base(sys.argv[1])\nexcept BaseModelError as error:\n"
        "    print(json.dumps([str(error), 'torch' in sys.modules]))"
    )
    said, torch_loaded = run_fresh(code, path)
    assert "The unet lacks 1 of its 686 tensors (mid_block.attentions.0.norm.weight)" in said and not torch_loaded


def test_a_width_of_another_model_is_told(tmp_path: Path) -> None:
    path = header_only(tmp_path / "real.safetensors", "sd1", **{NORM: (1024,)})
    with pytest.raises(BaseModelError, match=r"mid_block.attentions.0.norm.weight is \(1024,\) in the file, and \(1280,\)"):
        recognise_base(str(path))


def test_a_tokenizer_without_words_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    write_base(recognise_base(str(tiny_base)), tmp_path / "folder")
    (tmp_path / "folder" / "tokenizer" / "vocab.json").write_text(json.dumps({"a": 0}), encoding="utf-8")
    with pytest.raises(BaseModelError, match="1 words in place of 49,408"):
        recognise_base(str(tmp_path / "folder"))
