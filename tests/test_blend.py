"""Blending several LoRAs: equal to the sum of their deltas, to their exported file, and kept by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from tests.command_line import impasto
from tests.formats.examples import random_weights
from tests.tools.mergeable import PLAIN, save_adapter
from trainers.adapters import ADAPTERS
from trainers.adapters.inject import attach, set_row_strengths, set_strength
from trainers.adapters.layer import AdaptedLayer
from trainers.adapters.plan import Strengths, block_of
from trainers.attach import attach_files
from trainers.blend import Blend, blend_file, list_blends, read_blend, write_blend
from trainers.cells import LoraUse
from trainers.errors import AdapterFileError, SettingError
from trainers.families import load_family, recognise_base
from trainers.formats import ModuleWeights, read_adapter, read_without_base
from trainers.generate import Picture, RenderSettings, render
from trainers.layers import layer_shapes
from trainers.tools.merge import merge_adapters

HOW = RenderSettings(32, 32, steps=4, guidance=4.0, negative="blurry")
AMOUNTS = {"a": 0.7, "b": -0.4, "c": 1.3}


def three(shape: tuple[int, ...]) -> dict[str, ModuleWeights]:
    """A LoRA, a LoHa and a LoKr of different ranks for one layer."""
    lora, one, two = (random_weights(shape, rank, 2.0, rank) for rank in (3, 2, 4))
    (up, down), (other_up, other_down) = ((w.factors["up"].flatten(1), w.factors["down"].flatten(1)) for w in (one, two))
    flat = {"w1_a": up, "w1_b": down, "w2_a": other_up[:, :2], "w2_b": other_down[:2]}
    generator = torch.Generator().manual_seed(9)
    inner = torch.randn(shape[0] // 2, shape[1] // 2, *shape[2:], generator=generator)
    whole = {"w1": torch.randn(2, 2, generator=generator), "w2": inner}
    return {"a": lora, "b": ModuleWeights(flat, 1.0, "loha"), "c": ModuleWeights(whole, 1.0, "lokr")}


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Conv2d(6, 8, 3, padding=1)], ids=["linear", "convolution"])
def test_three_loras_together_are_in_float64_the_sum_of_their_deltas_at_their_strengths(layer: Any) -> None:
    """Of different types and ranks; one LoRA is not on the second layer at all."""
    layer = layer.double().requires_grad_(False)
    weights = three(tuple(layer.weight.shape))
    adapted = AdaptedLayer(layer)
    for name, one in weights.items():
        factors = ADAPTERS[one.kind].fit(
            {part: value.double() for part, value in one.factors.items()}, tuple(layer.weight.shape)
        )
        attach(adapted, name, ADAPTERS[one.kind], factors, one.scale)
    parts = {"unet": nn.ModuleDict({"mid_block": adapted})}
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, *((5, 6) if layer.weight.dim() == 2 else (6, 5, 5)), generator=generator, dtype=torch.float64)

    def wanted(amounts: dict[str, float]) -> torch.Tensor:
        total = layer.weight + sum(amount * adapted.adapters[name].delta(layer.weight) for name, amount in amounts.items())
        if layer.weight.dim() == 2:
            return nn.functional.linear(x, total, layer.bias)
        return nn.functional.conv2d(x, total, layer.bias, padding=1)

    for name, amount in AMOUNTS.items():
        set_strength(parts, name, Strengths(2 * amount, 9.0, {"mid": 0.5, "up_0": 0.0}))
    torch.testing.assert_close(adapted(x), wanted(AMOUNTS), rtol=1e-12, atol=1e-12)
    rows = [AMOUNTS, {"a": 1.0}, {"b": 2.0, "c": -1.0}]
    set_row_strengths(parts, rows)
    for row, amounts in enumerate(rows):
        torch.testing.assert_close(adapted(x)[row], wanted(amounts)[row], rtol=1e-6, atol=1e-6)  # strengths are float32
    set_row_strengths(parts, [{}, {}, {}])
    assert torch.equal(adapted(x), layer(x))


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three LoRAs of different ranks on different layers of both parts."""
    folder = tmp_path_factory.mktemp("three")
    kinds = (PLAIN, {"attn1.to_q": "lora", "attn1.to_out.0": "lora"}, {"resnets.0.conv1": "lora", "mlp.fc1": "lora"})
    return [
        save_adapter(folder / f"{rank}.safetensors", tiny_base, kind, rank, seed=rank)
        for kind, rank in zip(kinds, (2, 3, 5), strict=True)
    ]


BLEND = (Strengths(0.5, 0.5), Strengths(-0.3, 0.4, {"down_0": 0.5, "mid": 0.0}), Strengths(0.8, 0.0, {"up_0": -1.0}))


def test_a_blend_draws_what_its_exported_file_draws_at_strength_one(tiny_base: Path, files: list[Path], tmp_path: Path) -> None:
    merged = tmp_path / "sum.safetensors"
    merge_adapters(list(zip(files, BLEND, strict=True)), merged, dtype="fp32", family="sd1")
    model = load_family(recognise_base(str(tiny_base)), torch.float32, torch.device("cpu"))
    *names, whole = attach_files(model, [*files, merged])
    blended, exported, base = (
        numpy.asarray(render(model, [Picture("a red apple", 5, strengths)], HOW)[0]).astype(int)
        for strengths in (dict(zip(names, BLEND, strict=True)), {whole: 1.0}, {})
    )
    assert numpy.abs(blended - exported).max() <= 1
    assert numpy.abs(blended - base).max() > 8


def test_an_exported_blend_is_the_sum_of_deltas_at_their_strengths_by_part_and_block(files: list[Path], tmp_path: Path) -> None:
    merged = tmp_path / "sum.safetensors"
    merge_adapters(list(zip(files, BLEND, strict=True)), merged, dtype="fp32", family="sd1")
    made = read_without_base(merged, "sd1").modules
    wanted: dict[str, torch.Tensor] = {}
    for file, strengths in zip(files, BLEND, strict=True):
        for name, weights in read_without_base(file, "sd1").modules.items():
            if strengths.at(block_of(name)):
                wanted[name] = wanted.get(name, torch.zeros(())) + strengths.at(block_of(name)) * weights.delta()
    assert made.keys() == wanted.keys() and any(block_of(name) == "mid" for name in wanted)
    assert all(float((made[name].delta() - delta).norm()) <= 1e-6 * float(delta.norm()) for name, delta in wanted.items())
    with pytest.raises(AdapterFileError, match="nothing is left"):
        merge_adapters([(files[0], Strengths(0.0, 1.0, {"text": 0.0}))], tmp_path / "none.safetensors", family="sd1")


def test_a_blend_of_other_types_is_exported_at_a_rank(tiny_base: Path, files: list[Path], tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "loha.safetensors", tiny_base, {"attn1.to_q": "loha"}, 2, seed=9)
    inputs = [(files[0], Strengths(0.5, 0.5)), (other, Strengths(0.7, 0.7, {"mid": 0.0}))]
    merge_adapters(inputs, tmp_path / "sum.safetensors", rank=8, dtype="fp32", family="sd1")
    made = read_without_base(tmp_path / "sum.safetensors", "sd1").modules
    shapes = layer_shapes(recognise_base(str(tiny_base)))
    apart = read_adapter(other, shapes, shapes).modules
    name = next(name for name in apart if block_of(name) == "down_0")
    expected = 0.7 * apart[name].delta() + 0.5 * read_without_base(files[0], "sd1").modules[name].delta()
    torch.testing.assert_close(made[name].delta(), expected, rtol=1e-4, atol=1e-4)


def test_a_blend_is_kept_by_name_and_read_back_as_it_was(tmp_path: Path, files: list[Path]) -> None:
    inside = tmp_path / "loras" / "süß.safetensors"
    blend = Blend(
        (
            LoraUse(path=str(inside), unet=0.8, text=0.8),
            LoraUse(path=str(files[0]), unet=-0.25, text=1.5, blocks={"mid": 0.0, "up_1": 1.0}),
        )
    )
    write_blend(blend_file(tmp_path, "two of them"), blend, tmp_path)
    text = blend_file(tmp_path, "two of them").read_text(encoding="utf-8")
    assert 'file = "loras/süß.safetensors"' in text and "up_1" not in text
    again = read_blend(blend_file(tmp_path, "two of them"), tmp_path)
    assert [(lora.path, lora.strengths) for lora in again.loras] == [(lora.path, lora.strengths) for lora in blend.loras]
    assert list_blends(tmp_path) == ["two of them"] and list_blends(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "con", "a" * 61, "x\n", "trailing ", "dot."])
def test_a_blend_cannot_be_called_what_no_file_is_called(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingError):
        blend_file(tmp_path, name)


@pytest.mark.parametrize(
    "text",
    ["", "lora = 3", "x = 1", "[[lora]]\nunet = 1.0", '[[lora]]\nfile = "a"', '[[lora]]\nfile = "a"\nunet = 9.0',
     '[[lora]]\nfile = "a"\nunet = 1.0\nblocks = {sideways = 1.0}', '[[lora]]\nfile = "a"\nunet = "x"', "no toml"],
)  # fmt: skip
def test_a_damaged_blend_is_told_in_words(tmp_path: Path, text: str) -> None:
    file = tmp_path / "blends" / "a.toml"
    file.parent.mkdir()
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SettingError):
        read_blend(file, tmp_path)


def test_the_command_exports_a_blend_by_its_name(tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPASTO_HOME", str(tmp_path))
    uses = (
        LoraUse(path=str(file), unet=of.unet, text=of.text, blocks=dict(of.blocks))
        for file, of in zip(files, BLEND, strict=True)
    )
    write_blend(blend_file(tmp_path, "mine"), Blend(tuple(uses)), tmp_path)
    output = tmp_path / "out.safetensors"
    assert impasto("merge", "--blend", "mine", "--family", "sd1", "--output", output) == 0
    described = read_without_base(output, "sd1").metadata["modelspec.description"]
    assert "at -0.3 (text 0.4) down_0 x 0.5 mid x 0" in described
    assert impasto("merge", "--blend", "other", "--output", tmp_path / "none.safetensors") == 2
