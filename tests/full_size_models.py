"""Checkpoints of full size with random weights, as single files in LDM layout: the real keys, shapes and number format.

They are written straight from the configurations that ship, without the program's own writer and without any metadata,
so that they must be recognised as a stranger's file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from trainers.bench.synthetic import Shapes, draw_numbers, module_shapes
from trainers.container import Entry, serialise_header
from trainers.families import ASSETS
from trainers.families.configuration import read_configs
from trainers.families.ldm import part_layouts
from trainers.families.vocabulary import write_words
from trainers.files import write_atomically

KEYS = {
    "sd1": {"model.diffusion_model.": 686, "first_stage_model.": 248, "cond_stage_model.": 197},
    "sd2": {"model.diffusion_model.": 686, "first_stage_model.": 248, "cond_stage_model.": 294},
    "sdxl": {"model.diffusion_model.": 1680, "first_stage_model.": 248, "conditioner.": 587},
}
"""How many tensors of each part the published checkpoints have."""


def make_checkpoint(family: str, path: Path) -> None:
    """A checkpoint in fp16. Every tensor, the norms and biases too, differs from every other one."""
    shapes = checkpoint_shapes(family)
    entries, position = [], 0
    for key, shape in shapes.items():
        size = 8 * math.prod(shape) if _is_counter(key) else 2 * math.prod(shape)
        entries.append((key, Entry("I64" if _is_counter(key) else "F16", shape, position, position + size)))
        position += size

    def pieces() -> Iterator[bytes]:
        yield serialise_header(entries, {})
        for key, shape in shapes.items():
            yield _numbers(key, shape).view(torch.uint8).numpy().tobytes()

    write_atomically(path, pieces())


def checkpoint_shapes(family: str) -> Shapes:
    """Key -> shape of every tensor of a family's checkpoint, the counters that come first in a file before the rest."""
    configs = read_configs(ASSETS / "families" / family)
    shapes: Shapes = {}
    for part, layout in part_layouts(family, configs).items():
        for name, shape in module_shapes(part, configs[part]).items():
            place = layout.place(name.removeprefix("text_model."))
            assert place is not None, (part, name)
            if part == "vae" and ".mid.attn_1." in place.key and len(shape) == 2:
                shape = (*shape, 1, 1)  # as convolutions in the original
            if place.third >= 0:
                shape = (3 * shape[0], *shape[1:])
            shapes[place.key] = shape[::-1] if place.transposed else shape
    shapes |= _unread(family, shapes)
    counts = {start: sum(key.startswith(start) for key in shapes) for start in KEYS[family]}
    assert counts == KEYS[family], counts
    return dict(sorted(shapes.items(), key=lambda item: not _is_counter(item[0])))


def _unread(family: str, shapes: Shapes) -> Shapes:
    """What the published files hold besides: counters, the noise schedule, layers and factors that nothing reads."""
    clip, open_clip = {"sd1": ("cond_stage_model.transformer.", ""), "sd2": ("", "cond_stage_model.model.")}.get(
        family, ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
    )
    more: Shapes = {"betas": (1000,), "alphas_cumprod": (1000,)} if family != "sdxl" else {}
    if clip:
        more[f"{clip}text_model.embeddings.position_ids"] = (1, 77)
    if open_clip:
        more[f"{open_clip}logit_scale"] = ()
    if family == "sd2":  # its last layer, and a projection
        last, unread = (f"{open_clip}transformer.resblocks.{number}." for number in (22, 23))
        more |= {key.replace(last, unread): shape for key, shape in shapes.items() if key.startswith(last)}
        more[f"{open_clip}text_projection"] = (1024, 1024)
    return more


def _is_counter(key: str) -> bool:
    return key.endswith("position_ids")


def _numbers(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    if _is_counter(key):
        return torch.arange(math.prod(shape))
    if key in ("betas", "alphas_cumprod"):  # the genuine ones: stable-diffusion.cpp samples by them
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        return (betas if key == "betas" else torch.cumprod(1 - betas, dim=0)).half()
    return draw_numbers(key, shape)


def write_configuration(family: str, folder: Path) -> Path:
    """The configuration that ships with a tokenizer beside it: what diffusers wants to read a single file offline."""
    import shutil

    shutil.copytree(ASSETS / "families" / family, folder)
    for tokenizer in folder.glob("tokenizer*"):
        own = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
        shutil.copytree(ASSETS / "pocket" / "tokenizer", tokenizer, dirs_exist_ok=True)
        write_words(tokenizer)
        base = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(base | own), encoding="utf-8")
    return folder
