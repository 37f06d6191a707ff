"""A LoRA whose tensors lie as in the one before is read at once: the same numbers, and the same refusals, as read alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats.examples import SHAPES, join_file, random_lora, split_file
from trainers.errors import AdapterFileError
from trainers.formats import AdapterFile, FileDtype, FileForm, base_for, read_adapter, read_for, write_adapter


def save(path: Path, times: float = 1.0, form: FileForm = "kohya", dtype: FileDtype = "fp16", **shapes: Any) -> Path:
    """A LoRA of all layers, its factors `times` as large."""
    modules = {
        name: dataclasses.replace(module, factors={part: factor * times for part, factor in module.factors.items()})
        for name, module in random_lora(SHAPES | shapes).items()
    }
    write_adapter(path, modules, {"times": str(times)}, dtype, form)
    return join(path, *split_file(path))


def join(path: Path, header: dict[str, Any], data: bytes) -> Path:
    """As join_file, without blanks, as all writers of these files do."""
    return join_file(path, json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(), data)


def outcome(read: Callable[[], AdapterFile]) -> Any:
    """All that reading gives, or the words of the refusal."""
    try:
        file = read()
    except AdapterFileError as error:
        return error.what, error.where, error.hint
    modules = {
        name: (module.kind, module.alpha, {part: factor.tolist() for part, factor in module.factors.items()})
        for name, module in file.modules.items()
    }
    return modules, file.metadata, file.unmatched, file.family


@pytest.mark.parametrize("form", ["kohya", "peft"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_next_file_is_read_without_a_look_at_its_names_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: FileForm, dtype: FileDtype
) -> None:
    first, second = (save(tmp_path / f"{n}.safetensors", n, form, dtype, **{"unet.not.there": (8, 8)}) for n in (1, 2))
    wanted = [outcome(lambda path=path: read_adapter(path, SHAPES, SHAPES)) for path in (first, second)]
    assert wanted[0] != wanted[1] and wanted[0][2] == wanted[1][2] != ()
    base = base_for(SHAPES, SHAPES)
    kept = read_for(first, base)
    assert outcome(lambda: kept) == wanted[0]
    monkeypatch.setattr("trainers.formats.reading.group_keys", lambda keys: pytest.fail("the names were looked at"))
    again = read_for(second, base)
    assert outcome(lambda: read_for(first, base)) == wanted[0]
    assert (outcome(lambda: kept), outcome(lambda: again)) == tuple(wanted)  # what was read before stays as it is


def edit_metadata(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A damage: other metadata, the rest of the file as it was."""

    def damage(path: Path) -> None:
        header, data = split_file(path)
        join(path, {"__metadata__": change(header.pop("__metadata__")), **header}, data)

    return damage


def put_number(ending: str, number: float) -> Callable[[Path], None]:
    """A damage: one number of the first tensor whose key ends so."""

    def damage(path: Path) -> None:
        header, data = split_file(path)
        key = next(key for key in header if key.endswith(ending))
        raw = bytearray(data)
        kind = {"F16": torch.float16, "F32": torch.float32}[header[key]["dtype"]]
        number_bytes = torch.tensor([number], dtype=kind).view(torch.uint8).numpy().tobytes()
        end = header[key]["data_offsets"][1]
        raw[end - len(number_bytes) : end] = number_bytes
        join(path, header, bytes(raw))

    return damage


def twice(path: Path) -> None:
    """Two metadata, in front of the very same listing."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].decode().rstrip().replace('{"__metadata__":{', '{"__metadata__":{"a":"1","a":"2",', 1).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def two_swapped(path: Path) -> None:
    """The same names, two of the same shape at each other's places."""
    header, data = split_file(path)
    keys = [key for key in header if key.endswith(".alpha")]
    header[keys[0]], header[keys[1]] = header[keys[1]], header[keys[0]]
    raw = bytearray(data)
    raw[0:4] = torch.tensor([7.5]).view(torch.uint8).numpy().tobytes()
    join(path, header, bytes(raw))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "nan": put_number("lora_up.weight", math.nan),
    "infinite": put_number("lora_down.weight", -math.inf),
    "alpha infinite": put_number(".alpha", math.inf),
    "another alpha": put_number(".alpha", 5.0),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "long": lambda path: path.write_bytes(path.read_bytes() + b"12"),
    "no text": edit_metadata(lambda metadata: {"a": 1}),
    "no object": edit_metadata(lambda metadata: [1]),
    "other text": edit_metadata(lambda metadata: {"b": "é"}),
    "no metadata": edit_metadata(lambda metadata: {}),
    "metadata with twins": twice,
    "swapped places": two_swapped,
    "no UTF-8": lambda path: path.write_bytes(path.read_bytes().replace(b"lora_unet_not_there", b"lora_unet_not_ther\xff")),
    "a tail of a header": lambda path: path.write_bytes(cut_metadata(path)),
}


def cut_metadata(path: Path) -> bytes:
    """A file whose header begins behind the metadata: the listing is the same, and it is no JSON."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].decode()
    rest = text[text.index("},") + 1 :].encode()
    return len(rest).to_bytes(8, "little") + rest + raw[8 + length :]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_what_is_wrong_or_different_is_told_as_if_read_alone(
    tmp_path: Path, damage: Callable[[Path], None], dtype: FileDtype
) -> None:
    first, second = (save(tmp_path / f"{n}.safetensors", n, "kohya", dtype, **{"unet.not.there": (8, 8)}) for n in (1, 2))
    before, plain = outcome(lambda: read_adapter(first, SHAPES, SHAPES)), outcome(lambda: read_adapter(second, SHAPES, SHAPES))
    base = base_for(SHAPES, SHAPES)
    read_for(first, base)
    damage(second)
    alone = outcome(lambda: read_adapter(second, SHAPES, SHAPES))
    assert alone != plain
    assert outcome(lambda: read_for(second, base)) == alone
    assert outcome(lambda: read_for(first, base)) == before


def test_another_scaling_in_the_metadata_is_heeded(tmp_path: Path) -> None:
    first, second = (save(tmp_path / f"{n}.safetensors", n, "peft") for n in (1, 2))

    def halve(metadata: dict[str, str]) -> dict[str, str]:
        values = json.loads(metadata["lora_adapter_metadata"])
        values = {key: value / 2 if key.endswith("lora_alpha") else value for key, value in values.items()}
        return {**metadata, "lora_adapter_metadata": json.dumps(values)}

    edit_metadata(halve)(second)
    base = base_for(SHAPES, SHAPES)
    alphas = {name: module.alpha for name, module in read_for(first, base).modules.items()}
    halved = read_for(second, base)
    assert outcome(lambda: halved) == outcome(lambda: read_adapter(second, SHAPES, SHAPES))
    assert any(module.alpha != alphas[name] for name, module in halved.modules.items())


def test_large_numbers_that_only_their_sum_is_too_large_for_are_read(tmp_path: Path) -> None:
    first, second = (save(tmp_path / f"{n}.safetensors", n, "kohya", "fp32") for n in (1.0, 2e38))
    base = base_for(SHAPES, SHAPES)
    read_for(first, base)
    alone = outcome(lambda: read_adapter(second, SHAPES, SHAPES))
    assert isinstance(alone[0], dict)
    assert outcome(lambda: read_for(second, base)) == alone


def test_a_kind_whose_factors_are_worked_on_is_read_in_full_each_time(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name, key = "unet.down_blocks.0.resnets.0.conv1", "lora_unet_down_blocks_0_resnets_0_conv1"
    generator = torch.Generator().manual_seed(1)
    for number in (1, 2):
        tucker = {"lora_down.weight": (4, 32, 1, 1), "lora_up.weight": (48, 4, 1, 1), "lora_mid.weight": (4, 4, 3, 3)}
        tensors = {f"{key}.{part}": torch.randn(shape, generator=generator) for part, shape in tucker.items()}
        save_file(tensors, tmp_path / f"{number}.safetensors")
    base = base_for(SHAPES, SHAPES)
    for number in (1, 2, 1):
        path = tmp_path / f"{number}.safetensors"
        assert outcome(lambda path=path: read_for(path, base)) == outcome(lambda path=path: read_adapter(path, SHAPES, SHAPES))
    assert list(read_for(path, base).modules) == [name]
