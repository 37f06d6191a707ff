"""Files that are damaged, dishonest or meant for something else: each is refused in words, and nothing of it runs."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.formats.examples import SHAPES, join_file, random_lora, split_file
from trainers.errors import AdapterFileError
from trainers.formats import read_adapter, write_adapter
from trainers.formats.kohya import kohya_name

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KEY = kohya_name(LAYER)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "good.safetensors", random_lora(), {"ss_v2": "False"}, "fp32")
    return tmp_path / "good.safetensors"


def entries(header: dict[str, Any]) -> list[dict[str, Any]]:
    return [value for key, value in header.items() if key != "__metadata__"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def truncate_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"1234")


def length_bomb(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def not_json(path: Path) -> None:
    join_file(path, b"{'a': 1}", b"")


def deep_json(path: Path) -> None:
    join_file(path, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"")


def twice_the_same_name(path: Path) -> None:
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    join_file(path, b"{" + entry + b"," + entry + b"}", b"1234")


def json_list(path: Path) -> None:
    join_file(path, b"{}", b"")
    path.write_bytes((2).to_bytes(8, "little") + b"[]")


def overlap(path: Path) -> None:
    header, data = split_file(path)
    first, second = sorted(entries(header), key=lambda entry: entry["data_offsets"])[-2:]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]
    join_file(path, header, data)


def offsets_outside(path: Path) -> None:
    header, data = split_file(path)
    for entry in entries(header):
        entry["data_offsets"] = [offset + 1_000_000 for offset in entry["data_offsets"]]
    join_file(path, header, data)


def negative_offsets(path: Path) -> None:
    header, data = split_file(path)
    entries(header)[0]["data_offsets"] = [-4, 0]
    join_file(path, header, data)


def wrong_shape_sum(path: Path) -> None:
    header, data = split_file(path)
    entries(header)[-1]["shape"] = [2**39, 2**39]
    join_file(path, header, data)


def unknown_dtype(path: Path) -> None:
    header, data = split_file(path)
    entries(header)[-1]["dtype"] = "F7"
    join_file(path, header, data)


def metadata_not_text(path: Path) -> None:
    header, data = split_file(path)
    join_file(path, header | {"__metadata__": {"ss_v2": False}}, data)


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def web_page(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html><html>Please log in</html>")


def lfs_pointer(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def missing_file(path: Path) -> None:
    path.unlink()


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "cut short",
    truncate_header: "claims .* bytes and the file has 200",
    append: "belong to nothing",
    length_bomb: "claims .* bytes",
    not_json: "not JSON",
    deep_json: "not JSON",
    twice_the_same_name: "stands there twice",
    json_list: "not a JSON object",
    overlap: "overlaps",
    offsets_outside: "gap",
    negative_offsets: "no sizes",
    wrong_shape_sum: "needs .* bytes",
    unknown_dtype: "unknown dtype 'F7'",
    metadata_not_text: "metadata is not text",
    empty_file: "empty",
    web_page: "web page",
    lfs_pointer: "Git LFS",
    folder: "not a file",
    missing_file: "no such file",
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.items(), ids=[damage.__name__ for damage in DAMAGES])
def test_a_damaged_file_is_refused_in_words(good: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(good)
    with pytest.raises(AdapterFileError, match=words) as caught:
        read_adapter(good, SHAPES)
    assert str(good) in str(caught.value)


def test_random_damage_to_the_header_is_never_another_kind_of_error(good: Path) -> None:
    raw, random_numbers = good.read_bytes(), random.Random(0)
    header_end = 8 + int.from_bytes(raw[:8], "little")
    refused = 0
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[random_numbers.randrange(header_end)] = random_numbers.choice(b'0123456789,:[]{}"-e. \xff')
        good.write_bytes(damaged)
        try:
            read_adapter(good, SHAPES, SHAPES)
        except AdapterFileError:
            refused += 1
    assert refused > 200


def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    make = getattr(os, "mkfifo", os.mkdir)  # Windows has no pipes in folders.
    make(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="not a file"):
        read_adapter(tmp_path / "a.safetensors", SHAPES)


class Payload:
    """Unpickling this would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_a_pickle_under_another_name_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, trace = tmp_path / "a.safetensors", tmp_path / "trace"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"x": Payload(trace)}))
    else:
        torch.save({"x": Payload(trace)}, path)
    with pytest.raises(AdapterFileError, match="pickle"):
        read_adapter(path, SHAPES)
    assert not trace.exists()


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x3C00 + 0x3C])
def test_a_header_whose_length_looks_like_another_format_is_read(good: Path, length: int) -> None:
    header, data = split_file(good)
    part = {key: value for key, value in header.items() if key.startswith(KEY)}
    position, kept = 0, b""
    for entry in part.values():
        start, end = entry["data_offsets"]
        kept += data[start:end]
        entry["data_offsets"] = [position, position + end - start]
        position += end - start
    text = json.dumps(part, separators=(",", ":")).encode()
    join_file(good, text + b" " * (length - len(text)), kept)
    assert list(read_adapter(good, SHAPES).modules) == [LAYER]


def factors(down: tuple[int, ...] = (2, 24), up: tuple[int, ...] = (32, 2), key: str = KEY) -> dict[str, torch.Tensor]:
    return {f"{key}.lora_down.weight": torch.ones(down), f"{key}.lora_up.weight": torch.ones(up)}


WRONG: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "up and down swapped": (factors((32, 2), (2, 24)), "do not fit each other.*swapped"),
    "missing down": ({f"{KEY}.lora_up.weight": torch.ones(32, 2)}, "has no down factor"),
    "missing up": ({f"{KEY}.lora_down.weight": torch.ones(2, 24)}, "has no up factor"),
    "zero size": (factors((0, 24), (32, 0)), "size zero"),
    "whole numbers": ({name: tensor.to(torch.int32) for name, tensor in factors().items()}, "has dtype I32"),
    "NaN": ({name: tensor * float("nan") for name, tensor in factors().items()}, "NaN or infinite"),
    "alpha is NaN": (factors() | {f"{KEY}.alpha": torch.tensor(float("nan"))}, "not a single finite number"),
    "alpha is a list": (factors() | {f"{KEY}.alpha": torch.ones(2)}, "not a single finite number"),
    "three dimensions": (factors((2, 24, 1), (32, 2, 1)), "do not fit each other"),
    "spelled twice": (factors() | factors(key=LAYER), f"gives {LAYER} twice"),
    "other names only": (factors(key="lora_unet_x") | factors(key="lora_unet_y"), "None of the file's 2 modules"),
    "SDXL": (factors() | factors(key="lora_te2_text_model_encoder_layers_0_mlp_fc1"), "made for Stable Diffusion XL"),
    "an OFT": ({f"{KEY}.oft_blocks": torch.ones(2, 2)}, "holds an OFT; only lora"),
    "two kinds": (factors() | {f"{KEY}.lokr_w1": torch.ones(2, 2)}, "holds lokr and lora; only lora"),
    "a bias": (factors() | {f"{KEY}.diff_b": torch.ones(32)}, "changes the layer's bias"),
    "magnitudes for another width": (
        factors() | {f"{KEY}.dora_scale": torch.ones(31, 1)},
        r"dora_scale \(31, 1\) that does not",
    ),
    "a LoHa of terabytes": (
        {
            f"{KEY}.hada_{part}": torch.ones((60_000, 1) if part.endswith("a") else (1, 60_000))
            for part in ("w1_a", "w1_b", "w2_a", "w2_b")
        },
        "more than any model has",
    ),
    "a core of terabytes": (
        {
            f"{KEY}.lora_down.weight": torch.ones(1, 60_000),
            f"{KEY}.lora_up.weight": torch.ones(2, 60_000),
            f"{KEY}.lora_mid.weight": torch.ones(60_000, 1, 1, 1),
        },
        "more than any model has",
    ),
    "a LoKr of terabytes": (
        {f"{KEY}.lokr_w1": torch.ones(300, 300), f"{KEY}.lokr_w2": torch.ones(300, 300)},
        "more than any model has",
    ),
    "half a LoHa": ({f"{KEY}.hada_w1_a": torch.ones(32, 2)}, "has no w1_b and no w2_a and no w2_b factor"),
    "half a LoKr": ({f"{KEY}.lokr_w1": torch.ones(2, 2)}, "has no w2 factor"),
    "a base model": ({"model.diffusion_model.out.2.weight": torch.ones(2)}, "base model, not a LoRA"),
    "a textual inversion": ({"emb_params": torch.ones(2)}, "textual inversion"),
    "other tensors": ({"x": torch.ones(2)}, "There is no LoRA in the file; it holds x"),
    "no tensors": ({}, "no tensors"),
}


@pytest.mark.parametrize(("tensors", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_sound_file_with_wrong_contents_is_refused_in_words(
    tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=words):
        read_adapter(tmp_path / "a.safetensors", SHAPES)


def test_swapped_factors_of_a_square_layer_are_found_by_the_layers_shape(tmp_path: Path) -> None:
    save_file(factors((24, 2), (2, 24)), tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="swapped"):
        read_adapter(tmp_path / "a.safetensors", SHAPES, {LAYER: (24, 24)})


def test_factors_of_another_width_are_refused_with_both_shapes(tmp_path: Path) -> None:
    save_file(factors((2, 40)), tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"\(32, 40\), the base model's \(32, 24\)"):
        read_adapter(tmp_path / "a.safetensors", SHAPES, SHAPES)


def test_terminal_escapes_in_a_name_do_not_reach_the_message(tmp_path: Path) -> None:
    save_file(factors(key="lora_unet_\x1b[31mred\u202e"), tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(tmp_path / "a.safetensors", SHAPES)
    assert "\x1b" not in str(caught.value) and "\u202e" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(a+)+": 1}}'])
def test_a_peft_configuration_that_cannot_be_followed_is_refused(tmp_path: Path, text: str) -> None:
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(2, 24), f"{LAYER}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(AdapterFileError):
        read_adapter(tmp_path / "a.safetensors", SHAPES)
