"""Ten wrong model files, as a person would give them: refused in words, with nothing written and no payload run."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import contents, impasto
from trainers.adapters.inject import find_layers
from trainers.families import recognise_base
from trainers.formats import ModuleWeights, write_adapter
from trainers.formats.base_file import write_base


@pytest.fixture(scope="module")
def place(tiny_base: Path, tiny_sdxl_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of which each makes one wrong; `one.safetensors` is a sound SD1 base, `xl-lora.safetensors` is for SDXL."""
    from tests.tiny_models import tiny_sdxl_unet

    folder = tmp_path_factory.mktemp("wrong")
    write_base(recognise_base(str(tiny_base)), folder / "one.safetensors")
    layers: dict[str, Any] = {
        name: layer for name, layer in find_layers({"unet": tiny_sdxl_unet()}).items() if ".attn2." in name
    }
    modules = {
        name: ModuleWeights({"down": torch.ones(2, layer.weight.shape[1]), "up": torch.ones(layer.weight.shape[0], 2)}, 2.0)
        for name, layer in layers.items()
    }
    write_adapter(folder / "xl-lora.safetensors", modules, {}, "fp32", family="sdxl")
    return folder


def tensors_of(place: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    raw = (place / "one.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    return load_file(place / "one.safetensors"), header["__metadata__"]


def base_with(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path, Path], list[object]]:
    def make(place: Path, work: Path) -> list[object]:
        tensors, metadata = tensors_of(place)
        change(tensors)
        save_file(tensors, work / "bad.safetensors", metadata)
        return ["--base", work / "bad.safetensors"]

    return make


def raw(data: Callable[[Path], bytes], name: str = "bad.safetensors") -> Callable[[Path, Path], list[object]]:
    def make(place: Path, work: Path) -> list[object]:
        (work / name).write_bytes(data(place))
        return ["--base", work / name]

    return make


NORM = "model.diffusion_model.middle_block.1.norm.weight"


def drop_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NORM]


def only_unet(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if not key.startswith("model.")]:
        del tensors[key]


def spoil_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = torch.full_like(tensors[NORM], float("nan"))


def widen_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = torch.ones(65)


def pickled(place: Path, work: Path) -> list[object]:
    torch.save({"state_dict": {NORM: torch.ones(1)}}, work / "bad.safetensors")
    return ["--base", work / "bad.safetensors"]


def payload(place: Path, work: Path) -> list[object]:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (work.parent / "was run",))

    torch.save({"state_dict": {NORM: torch.ones(1)}, "callbacks": Payload()}, work / "bad.ckpt")
    return ["--base", work / "bad.ckpt"]


def empty_tokenizer(place: Path, work: Path) -> list[object]:
    write_base(recognise_base(str(place / "one.safetensors")), work / "bad")
    for name in ("vocab.json", "merges.txt"):
        (work / "bad" / "tokenizer" / name).write_text("{}" if name.endswith("json") else "#version: 0.2\n", encoding="utf-8")
    return ["--base", work / "bad"]


def sdxl_lora(place: Path, work: Path) -> list[object]:
    return ["--base", place / "one.safetensors", "--lora", place / "xl-lora.safetensors"]


WRONG: dict[str, tuple[Callable[[Path, Path], list[object]], tuple[str, ...]]] = {
    "an SDXL LoRA on SD1": (sdxl_lora, ("Stable Diffusion XL", "Stable Diffusion 1.x")),
    "a file cut short": (raw(lambda place: (place / "one.safetensors").read_bytes()[:-999]), ("cut short",)),
    "a header bomb": (raw(lambda place: struct.pack("<Q", 2**61) + b"{}" * 99), ("header claims",)),
    "a pickle called .safetensors": (pickled, ("pickle", "can run programs")),
    "a .ckpt with a payload": (payload, ("can run programs", "was not opened")),
    "a denoiser only": (base_with(only_unet), ("no text encoder", "whole checkpoint")),
    "a missing tensor": (base_with(drop_norm), ("lacks 1 of its", "mid_block.attentions.0.norm.weight")),
    "a NaN": (base_with(spoil_norm), ("NaN", "mid_block.attentions.0.norm.weight")),
    "a wrong width": (base_with(widen_norm), ("(65,)", "mid_block.attentions.0.norm.weight")),
    "an empty tokenizer": (empty_tokenizer, ("0 words in place of 49,408", "vocab.json")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_is_refused_in_words(name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = WRONG[name]
    (tmp_path / "work").mkdir()
    options = make(place, tmp_path / "work")
    before = contents(tmp_path)
    code = impasto("generate", "--prompt", "a cat", "--steps", 1, "--output", tmp_path / "x.png", *options)
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("impasto: ") and all(word in said for word in words), said
    assert contents(tmp_path) == before
