"""Every kind and every scheme through files: what is read has the same delta when it is written and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.kinds import EXAMPLES, Example, frozen_weight
from tests.formats.examples import random_weights
from trainers.adapters import ADAPTERS
from trainers.adapters.loha import LOHA
from trainers.adapters.lokr import TrainedLoKr
from trainers.errors import AdapterFileError
from trainers.formats import ModuleWeights, read_adapter, write_adapter
from trainers.formats.keys import suffix_of
from trainers.formats.plain import nearest_lora, rank_within, to_lora
from trainers.tools.inspect_file import inspect_file

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "unet.mid_block.resnets.0.conv1"
PREFIXES = {
    "kohya": {LINEAR: "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
              CONVOLUTION: "lora_unet_mid_block_resnets_0_conv1"},
    "ldm": {LINEAR: "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
            CONVOLUTION: "lora_unet_middle_block_0_in_layers_2"},
    "dotted": {LINEAR: LINEAR, CONVOLUTION: CONVOLUTION},
}  # fmt: skip
every_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())


def layer_of(example: Example) -> str:
    return LINEAR if len(example.shape) == 2 else CONVOLUTION


def save_example(path: Path, example: Example, scheme: str = "kohya") -> Path:
    prefix = PREFIXES[scheme][layer_of(example)]
    save_file({f"{prefix}.{part}": tensor.float() for part, tensor in example.tensors().items()}, path)
    return path


def read_example(path: Path, example: Example, family: str = "sd1") -> ModuleWeights:
    name = layer_of(example)
    return read_adapter(path, [LINEAR, CONVOLUTION], {name: example.shape}, family).modules[name]


def delta_of(weights: ModuleWeights, example: Example) -> torch.Tensor:
    return weights.delta(frozen_weight(example.shape))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", PREFIXES)
@every_example
def test_what_is_read_is_written_back_with_the_same_delta(tmp_path: Path, example: Example, scheme: str) -> None:
    family = "sdxl" if scheme == "ldm" else "sd1"
    first = read_example(save_example(tmp_path / "a.safetensors", example, scheme), example, family)
    delta = delta_of(first, example)
    assert first.kind == example.kind and float(delta.norm()) == pytest.approx(example.golden[0], rel=1e-5)
    write_adapter(tmp_path / "b.safetensors", {layer_of(example): first}, {}, "fp32", "kohya", family)
    again = read_example(tmp_path / "b.safetensors", example, family)
    assert relative(delta_of(again, example), delta) < 1e-6
    stored, expected = load_file(tmp_path / "b.safetensors"), example.tensors()
    name = PREFIXES["ldm" if family == "sdxl" else "kohya"][layer_of(example)]
    if not {"lora_mid.weight", "diff"} & expected.keys():  # a core is multiplied in; a difference has no alpha
        assert {key: tensor.shape for key, tensor in stored.items()} == {
            f"{name}.{key}": tensor.shape for key, tensor in expected.items()
        }


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 5e-3), ("bf16", 5e-2)])
@every_example
def test_every_kind_keeps_its_delta_in_half_precision(tmp_path: Path, example: Example, dtype: Any, limit: float) -> None:
    first = read_example(save_example(tmp_path / "a.safetensors", example), example)
    write_adapter(tmp_path / "b.safetensors", {layer_of(example): first}, {}, dtype)
    assert relative(delta_of(read_example(tmp_path / "b.safetensors", example), example), delta_of(first, example)) < limit


@every_example
def test_the_peft_form_holds_lora_and_dora_and_refuses_the_rest_in_words(tmp_path: Path, example: Example) -> None:
    first, name = read_example(save_example(tmp_path / "a.safetensors", example), example), layer_of(example)
    if example.kind not in ("lora", "dora") or first.factors.get("dora_scale", torch.ones(2)).shape[0] == 1:
        with pytest.raises(AdapterFileError, match=rf"{name} is a {example.kind} that the peft form .* plain LoRA"):
            write_adapter(tmp_path / "b.safetensors", {name: first}, {}, "fp32", "peft")
        return
    write_adapter(tmp_path / "b.safetensors", {name: first}, {}, "fp32", "peft")
    again = read_example(tmp_path / "b.safetensors", example)
    assert again.kind == example.kind and again.scale == 1.0
    assert relative(delta_of(again, example), delta_of(first, example)) < 1e-6


@every_example
def test_a_plain_lora_of_enough_rank_is_exact_and_of_less_the_best_there_is(tmp_path: Path, example: Example) -> None:
    first = read_example(save_example(tmp_path / "a.safetensors", example), example)
    base = frozen_weight(example.shape)
    delta = first.delta(base)
    made, error = to_lora(layer_of(example), first, 100, base)
    assert error < 1e-6 and relative(made.delta(), delta) < 1e-6
    assert made.kind == "lora" and made.alpha == made.rank <= 12
    less, error = to_lora(layer_of(example), first, 1, base)
    singular = torch.linalg.svdvals(delta.flatten(1))
    assert error == pytest.approx(float(singular[1:].norm() / singular.norm()), rel=1e-5, abs=1e-6)
    assert less.rank == 1 and relative(less.delta(), delta) == pytest.approx(error, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("scale", [0.7, -1.3])
@pytest.mark.parametrize("shape", [(40, 30), (24, 36), (20, 10, 3, 3)], ids=str)
@pytest.mark.parametrize(("kind", "rank"), [("loha", 3), ("lokr", 2), ("lokr", 64)])
def test_a_factored_change_is_decomposed_without_its_matrix(kind: str, rank: int, shape: tuple[int, ...], scale: float) -> None:
    made: Any = LOHA if kind == "loha" else TrainedLoKr(5)
    generator = torch.Generator().manual_seed(3)
    sizes = made.factor_shapes(shape, rank)
    factors = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    whole = ADAPTERS[kind].delta(factors, scale).flatten(1)
    left, values, right = ADAPTERS[kind].svd(factors, scale, 99)
    assert relative(left * values @ right, whole) < 1e-10
    wanted_left, wanted, wanted_right = torch.linalg.svd(whole, full_matrices=False)
    assert len(values) < len(wanted) or rank == 64
    assert float((values - wanted[: len(values)]).abs().max()) < 1e-10 * float(wanted[0]) > float(wanted[len(values) :].norm())
    left, values, right = ADAPTERS[kind].svd(factors, scale, 4)
    nearest = wanted_left[:, :4] * wanted[:4] @ wanted_right[:4]
    assert left.shape[1] == 4 and relative(left * values[:4] @ right, nearest) < 1e-10


@pytest.mark.parametrize("shape", [(40, 90), (90, 10, 2, 2)], ids=str)
def test_a_dora_is_baked_by_its_squares_as_near_as_by_all_of_it(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(shape, generator=generator)
    lora = random_weights(shape, 3, 3.0, 5)
    magnitude = base.flatten(1).norm(dim=1) * (1 + 0.02 * torch.randn(shape[0], generator=generator))
    dora = ModuleWeights({**lora.factors, "dora_scale": magnitude.reshape(-1, *(1 for _ in shape[1:]))}, 3.0, "dora")
    values = torch.linalg.svdvals(dora.delta(base).flatten(1))
    for rank, within in ((8, 0.01), (90, 0.3)):
        made, error, needed = nearest_lora("x", dora, rank, base, within)
        assert needed == rank_within(values, within) and made.rank == min(rank, needed)
        assert error == pytest.approx(float(values[made.rank :].norm() / values.norm()), rel=1e-6)
    still = ModuleWeights({"diff": torch.zeros(shape)}, 1.0, "full")
    made, error, _ = nearest_lora("x", still, 8, None, 0.01)
    assert error == 0.0 and made.rank == 1 and not made.delta().any()


def test_a_lora_of_lower_rank_than_asked_stays_exact_and_a_zero_one_becomes_zero() -> None:
    weights = random_weights((48, 32, 3, 3), rank=4, alpha=6.0, seed=1)
    made, error = to_lora("x", weights, 16)
    assert made.rank == 4 and error < 1e-6 and made.factors["down"].shape == (4, 32, 3, 3)
    zero = ModuleWeights({"down": torch.ones(2, 5), "up": torch.zeros(6, 2)}, 2.0)
    made, error = to_lora("x", zero, 4)
    assert error == 0.0 and float(made.delta().norm()) == 0.0


def test_a_dora_becomes_no_plain_lora_without_the_base(tmp_path: Path) -> None:
    example = EXAMPLES["dora"]
    weights = read_example(save_example(tmp_path / "a.safetensors", example), example)
    with pytest.raises(AdapterFileError, match="depends on the base model's weight"):
        to_lora(LINEAR, weights, 4)


@pytest.mark.parametrize("name", ["lora", "loha", "lokr factored", "lokr whole"])
def test_a_stored_scale_goes_before_alpha_in_every_kind(tmp_path: Path, name: str) -> None:
    example = EXAMPLES[name]
    plain = read_example(save_example(tmp_path / "a.safetensors", example), example)
    tensors = load_file(tmp_path / "a.safetensors") | {f"{PREFIXES['kohya'][LINEAR]}.scale": torch.tensor(0.25)}
    save_file(tensors, tmp_path / "b.safetensors")
    found = read_example(tmp_path / "b.safetensors", example)
    assert relative(found.delta(), plain.delta() * (0.25 / plain.scale)) < 1e-6


def test_a_lokr_of_two_whole_factors_is_not_scaled_by_its_alpha(tmp_path: Path) -> None:
    example = EXAMPLES["lokr whole"]
    path = save_example(tmp_path / "a.safetensors", example)
    save_file(load_file(path) | {f"{PREFIXES['kohya'][LINEAR]}.alpha": torch.tensor(1e6)}, path)
    assert float(read_example(path, example).delta().norm()) == pytest.approx(example.golden[0], rel=1e-6)


@pytest.mark.parametrize("shape", [(12,), (12, 1), (12, 1, 1, 1), (1, 12, 1, 1)])
def test_pefts_magnitudes_are_one_for_each_output_in_every_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = EXAMPLES["dora"].tensors()
    keys = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    made = {f"{LINEAR}.{keys[part]}": tensors[part].float() for part in keys}
    made[f"{LINEAR}.lora_magnitude_vector"] = tensors["dora_scale"].float().reshape(shape)
    save_file(made, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2})})
    found = read_example(tmp_path / "a.safetensors", EXAMPLES["dora"])
    assert relative(delta_of(found, EXAMPLES["dora"]), delta_of_golden("dora")) < 1e-6


def delta_of_golden(name: str) -> torch.Tensor:
    from tests.adapters.test_kinds import weights_of

    return weights_of(EXAMPLES[name]).delta(frozen_weight(EXAMPLES[name].shape))


def test_lora_and_dora_side_by_side_are_refused_in_peft_form(tmp_path: Path) -> None:
    dora = read_example(save_example(tmp_path / "a.safetensors", EXAMPLES["dora"]), EXAMPLES["dora"])
    modules = {LINEAR: dora, "unet.mid_block.attentions.0.proj_in": random_weights((12, 8), 2, 2.0, 0)}
    with pytest.raises(AdapterFileError, match="side by side"):
        write_adapter(tmp_path / "b.safetensors", modules, {}, "fp32", "peft")


def test_magnitudes_keep_float32_beside_half_precision_factors(tmp_path: Path) -> None:
    dora = read_example(save_example(tmp_path / "a.safetensors", EXAMPLES["dora"]), EXAMPLES["dora"])
    for form in ("kohya", "peft"):
        write_adapter(tmp_path / f"{form}.safetensors", {LINEAR: dora}, {}, "fp16", form)  # type: ignore[arg-type]
        stored = load_file(tmp_path / f"{form}.safetensors")
        (magnitude,) = (tensor for key, tensor in stored.items() if "dora_scale" in key or "magnitude" in key)
        assert magnitude.dtype == torch.float32


@every_example
def test_a_file_of_every_kind_is_inspected_without_a_base(tmp_path: Path, example: Example) -> None:
    inspection = inspect_file(save_example(tmp_path / "a.safetensors", example))
    (module,) = inspection.modules
    assert module.fault == "" and module.part == "unet"
    assert module.kind == example.kind or (module.kind == "locon" and example.kind == "lora")
    if "dora" in example.kind:
        assert module.norm is None
    else:
        assert module.norm == pytest.approx(example.golden[0], rel=1e-5)
    assert not [problem for problem in inspection.problems if problem.severity == "error"]


def test_the_ending_of_every_part_is_the_one_that_is_read() -> None:
    from trainers.adapters import ADAPTERS
    from trainers.formats.keys import split_key

    for name, kind in ADAPTERS.items():
        for part in kind.parts:
            found = split_key("x" + suffix_of(part, name))
            assert found is not None and found[0] == "x" and found[2] == part
            assert found[1] in {*name.split(" and "), "lora"}
