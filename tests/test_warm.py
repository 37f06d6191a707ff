"""LoRA files swapped beside one warm base: the base's bits stay, no memory is lost, and strengths come and go exactly."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny_models import WIDTH, tiny_text_encoder, tiny_unet
from trainers.adapters.inject import find_layers, set_strength
from trainers.errors import AdapterFileError
from trainers.formats import FileDtype, ModuleWeights, write_adapter
from trainers.warm import KEPT_LORAS, Warm, adapted_layers, lora_mark

RANK = 8


def loaded(dtype: torch.dtype = torch.float32) -> Any:
    """What Warm needs of a base: its parts and facts."""
    parts = {"unet": tiny_unet().to(dtype), "text_encoder": tiny_text_encoder().to(dtype)}
    facts = SimpleNamespace(family=SimpleNamespace(name="sd1"), clip_skip=1, prediction_type="epsilon")
    return SimpleNamespace(parts=lambda: parts, facts=facts)


def save(model: Any, path: Path, seed: int, dtype: FileDtype = "fp16") -> str:
    """A LoRA of all attention layers of both parts."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, layer in find_layers(model.parts()).items():
        if "attn" in name:
            out, inner = layer.weight.shape  # type: ignore[misc]
            factors = {"down": torch.randn(RANK, inner, generator=generator), "up": torch.randn(out, RANK, generator=generator)}
            modules[name] = ModuleWeights(factors, float(RANK))
    write_adapter(path, modules, {"seed": str(seed)}, dtype)
    return str(path)


@torch.no_grad()
def answers(model: Any) -> list[torch.Tensor]:
    """What the base's parts say to fixed inputs."""
    unet, text = model.parts().values()
    generator = torch.Generator().manual_seed(1)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, WIDTH, generator=generator)
    noise = unet(latents.to(unet.dtype), torch.tensor([500, 5]), encoder_hidden_states=states.to(unet.dtype)).sample
    return [noise, text(torch.tensor([[49406, 320, 2368, 49407]])).last_hidden_state]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def adapter(warm: Warm, model: Any, path: str) -> str:
    """Name of the file's adapter, as the worker asks for it."""
    return warm.adapter(model, lora_mark(path), lambda event: None)


def bytes_held() -> int:
    """Of all tensors that are there, each storage counted once."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)  # others, which stand in for tensors, have no memory
    tensors = [one for one in gc.get_objects() if type(one) in plain and one.layout == torch.strided]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_100_strengths_zero_is_the_base_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = loaded(dtype)
    base = answers(model)
    name = adapter(Warm(), model, save(model, tmp_path / "a.safetensors", 0))
    at_one = answers(model)
    assert not same(at_one, base)
    for number in range(100):
        set_strength(model.parts(), name, (number - 30) / 25)
        if number % 20 == 0:
            assert not same(answers(model), base)
    set_strength(model.parts(), name, 0.0)
    assert same(answers(model), base)
    set_strength(model.parts(), name, 1.0)
    assert same(answers(model), at_one)


def set_strength_of_all_but(model: Any, name: str) -> None:
    """The one adapter at strength 1, all others at 0."""
    for layer in adapted_layers(model):
        layer.strengths = {other: float(other == name) for other in layer.adapters}


@pytest.mark.parametrize("damage", ["nan", "short", "other width"])
def test_a_bad_file_is_refused_with_the_base_and_the_loras_left_as_they_were(tmp_path: Path, damage: str) -> None:
    model, warm = loaded(), Warm()
    adapter(warm, model, save(model, tmp_path / "good.safetensors", 0))
    before = answers(model)
    bad = Path(save(model, tmp_path / "bad.safetensors", 1))
    if damage == "nan":
        bad.write_bytes(bad.read_bytes()[:-2] + b"\xff\x7f")
    elif damage == "short":
        bad.write_bytes(bad.read_bytes()[:-2])
    else:
        layer = next(name for name in find_layers(model.parts()) if name.endswith("to_q"))
        write_adapter(bad, {layer: ModuleWeights({"down": torch.ones(2, 7), "up": torch.ones(9, 2)}, 2.0)}, {})
    with pytest.raises(AdapterFileError):
        adapter(warm, model, str(bad))
    assert same(answers(model), before)
    assert {len(layer.adapters) for layer in adapted_layers(model)} == {1}


def test_layers_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, warm = loaded(), Warm()
    files = [save(model, tmp_path / f"{seed}.safetensors", seed) for seed in range(2)]
    adapter(warm, model, files[0])
    for name in ("find_layers", "adapt_layers"):
        monkeypatch.setattr(f"trainers.attach.{name}", lambda *given: pytest.fail("the modules were walked again"))
    adapter(warm, model, files[1])
    assert {len(layer.adapters) for layer in adapted_layers(model)} == {2}


KINDS = ("attn1.to_q", "attn2", "ff.net", "resnets.0.conv1", "proj_in", "self_attn", "mlp", "to_out", "conv2", "attn1.to_k")


def save_one_of_ten(model: Any, path: Path, number: int) -> str:
    """A LoRA of its own rank on its own kind of layers."""
    generator = torch.Generator().manual_seed(number)
    modules = {}
    for name, layer in find_layers(model.parts()).items():
        if KINDS[number] in name:
            out, inner, *kernel = layer.weight.shape  # type: ignore[misc]
            down = torch.randn(number + 2, inner, *kernel, generator=generator)
            up = torch.randn(out, number + 2, *(1 for _ in kernel), generator=generator)
            modules[name] = ModuleWeights({"down": down, "up": up}, 1.0)
    assert modules, KINDS[number]
    write_adapter(path, modules, {}, "fp16")
    return str(path)


def test_1000_swaps_of_ten_loras_of_other_ranks_and_layers_leave_nothing_behind(tmp_path: Path) -> None:
    model, warm = loaded(), Warm()
    base = answers(model)
    files = [save_one_of_ten(model, tmp_path / f"{number}.safetensors", number) for number in range(10)]
    seen = []
    held = tensors = 0
    for number in range(1000):
        name = adapter(warm, model, files[number % 10])
        if number < 10:
            set_strength_of_all_but(model, name)
            seen.append(answers(model))
        if number == 99:
            held, tensors = bytes_held(), tensor_count()
    assert (bytes_held(), tensor_count()) == (held, tensors)
    layers = adapted_layers(model)
    there = {name for layer in layers for name in layer.adapters}
    assert len(there) == KEPT_LORAS and there == {name for layer in layers for name in layer.strengths}
    assert not any(same(seen[0], other) for other in seen[1:])
    set_strength_of_all_but(model, adapter(warm, model, files[0]))
    assert same(answers(model), seen[0])
    for name in dict.fromkeys(name for layer in layers for name in layer.adapters):
        set_strength(model.parts(), name, 0.0)
    assert same(answers(model), base)


def tensor_count() -> int:
    """How many tensors are there, without those that only stand in for one."""
    gc.collect()
    return sum(type(one) in (torch.Tensor, torch.nn.Parameter) for one in gc.get_objects())
