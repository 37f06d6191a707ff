"""The rank that an update uses: against numpy's singular values, for every type, and what `impasto inspect` says of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.kinds import EXAMPLES
from tests.formats.examples import random_lora, random_weights
from tests.test_cli import impasto
from trainers.adapters import ADAPTERS
from trainers.export import Exported
from trainers.formats import ModuleWeights, write_adapter
from trainers.formats.ranks import effective_rank, singular_values, summarise, used_rank
from trainers.formats.reading import factors_of
from trainers.tools.inspect_file import as_json, describe, inspect_file

TO_K = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
SHORT = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid"}


def of_values(values: list[float], out: int = 12, inner: int = 9, seed: int = 0) -> ModuleWeights:
    """A LoRA of which the delta has these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q for n in (out, inner)
    )
    return ModuleWeights({"up": left * torch.tensor(values, dtype=torch.float64), "down": right.T}, float(len(values)))


def by_numpy(delta: torch.Tensor) -> tuple[float, int, numpy.ndarray]:
    """(effective rank, rank that keeps 99 %, singular values), from the whole matrix."""
    values = numpy.linalg.svd(delta.flatten(1).numpy(), compute_uv=False)
    shares = values[values > 1e-14] / values.sum()
    kept = numpy.cumsum(values**2) / (values**2).sum()
    return math.exp(-(shares * numpy.log(shares)).sum()), int((kept < 0.99).sum()) + 1, values


@pytest.mark.parametrize(
    ("values", "effective", "keeps"),
    [
        ([2.0, 2.0, 2.0, 2.0], 4.0, 4),
        ([3.0, 0.0, 0.0, 0.0], 1.0, 1),
        ([3.0, 1.0], 4 / 3**0.75, 2),
        ([1.0, 0.01], math.exp(-(math.log(1 / 1.01) + 0.01 * math.log(0.01 / 1.01)) / 1.01), 1),
        ([0.0, 0.0], 0.0, 0),
    ],
)
def test_known_singular_values_give_known_ranks(values: list[float], effective: float, keeps: int) -> None:
    used = used_rank(of_values(values))
    assert used is not None
    assert (used.effective, used.keeps, used.most) == (pytest.approx(effective, abs=1e-9), keeps, len(values))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if "dora" not in name])
def test_every_type_agrees_with_numpy_on_the_whole_matrix(name: str) -> None:
    example = EXAMPLES[name]
    tensors = {SHORT.get(part, part.removeprefix("hada_").removeprefix("lokr_")): t for part, t in example.tensors().items()}
    tensors.pop("alpha")
    weights = ModuleWeights(factors_of(tensors), example.alpha, example.kind)
    effective, keeps, values = by_numpy(weights.delta())
    found, used = singular_values(weights), used_rank(weights)
    assert found is not None and used is not None
    count = min(len(found), len(values))
    numpy.testing.assert_allclose(found[:count], values[:count], rtol=1e-10, atol=1e-13)
    assert all(value < 1e-12 for value in (*found[count:], *values[count:]))
    assert (used.effective, used.keeps) == (pytest.approx(effective, rel=1e-9), keeps)


@pytest.mark.parametrize("shape", [(32, 24), (24, 16, 3, 3), (40, 4)], ids=["linear", "convolution", "rank above a side"])
def test_a_lora_is_told_from_its_factors_as_from_its_matrix(shape: tuple[int, ...]) -> None:
    weights = random_weights(shape, 6, 3.0, seed=2)
    effective, keeps, _ = by_numpy(weights.delta())
    used = used_rank(weights)
    assert used is not None and (used.effective, used.keeps) == (pytest.approx(effective, rel=1e-9), keeps)
    assert used.most == min(6, shape[1] * (9 if len(shape) == 4 else 1))


def test_what_depends_on_the_base_or_is_too_large_is_not_told() -> None:
    lora = random_weights((32, 24), 4, 4.0, seed=0).factors
    assert used_rank(ModuleWeights({**lora, "dora_scale": torch.ones(32, 1)}, 4.0, "dora")) is None
    assert used_rank(ModuleWeights({"diff": torch.ones(700, 650)}, 1.0, "full")) is None
    wide = used_rank(ModuleWeights({"diff": torch.ones(700, 40)}, 1.0, "full"))
    assert wide is not None and wide.effective == pytest.approx(1.0) and wide.most == 40


def test_a_runs_end_counts_the_layers_that_are_too_large_and_calls_no_difference_a_lora() -> None:
    small, large = (ModuleWeights({"diff": torch.ones(size, 650)}, 1.0, "full") for size in (40, 700))
    told = Exported({"unet.a": small, "unet.b": large, "unet.c": small}).ranks()
    assert told.startswith("The adapter uses 1.0 of 40 ranks; ") and " 1 of its 3 layers are left out" in told
    assert Exported({"unet.a": of_values([1.0])}).ranks().startswith("The LoRA uses 1.0 of 1 ranks")
    assert Exported({"unet.b": large}).ranks() == ""


def test_the_scale_and_the_sign_change_no_rank() -> None:
    assert effective_rank(torch.tensor([3.0, 1.0, 0.2])) == pytest.approx(effective_rank(torch.tensor([30.0, 10.0, 2.0])))
    module = of_values([3.0, 1.0])
    other = used_rank(ModuleWeights(module.factors, -7.0))
    one = used_rank(module)
    assert one and other and other.effective == pytest.approx(one.effective) and other.keeps == one.keeps


def test_the_rank_for_all_keeps_99_percent_of_all_modules_together() -> None:
    modules = [of_values([5.0, 1.0, 0.5], seed=1), of_values([0.3, 0.2, 0.1, 0.1], seed=2), of_values([0.0, 0.0], seed=3)]
    found = summarise([*map(used_rank, modules), None])
    assert found is not None

    def kept(rank: int) -> float:
        parts = [numpy.linalg.svd(module.delta().numpy(), compute_uv=False) ** 2 for module in modules]
        return float(sum(part[:rank].sum() for part in parts) / sum(part.sum() for part in parts))

    assert found.keeps == next(rank for rank in range(5) if kept(rank) >= 0.99)
    alone = [used_rank(module) for module in modules[:2]]
    assert found.effective == pytest.approx(sum(each.effective for each in alone if each) / 2) and found.most == 4
    assert found.sentence() == f"uses {found.effective:.1f} of 4 ranks; rank {found.keeps} would keep 99 % of it"
    assert summarise([used_rank(modules[2]), None]) is None


def test_inspect_tells_it_for_the_file_by_block_and_by_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat, single = of_values([1.0] * 4, 32, 24), of_values([1.0, 0, 0, 0], 32, 24)
    modules = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": flat,
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": single,
    }
    modules = {name: ModuleWeights({k: v.float() for k, v in one.factors.items()}, one.alpha) for name, one in modules.items()}
    write_adapter(tmp_path / "a.safetensors", modules, {}, "fp32")
    assert impasto("inspect", tmp_path / "a.safetensors", "--modules") == 0
    said = capsys.readouterr().out
    assert "used        2.5 of 4 ranks; rank 4 would keep 99 % of it" in said
    assert f"down_1    {'#' * 24}  4.0 of 4, rank 4 keeps 99 %" in said
    assert f"mid       {'#' * 6}{'.' * 18}  1.0 of 4, rank 1 keeps 99 %" in said
    assert f"{TO_K}  uses 4.0 of 4, 4 keep 99 %" in said
    assert impasto("inspect", tmp_path / "a.safetensors", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["used"] == {"effective": pytest.approx(2.5), "most": 4, "keeps": 4}
    assert {module["name"]: module["used"]["keeps"] for module in told["modules"]}[TO_K] == 4


def test_every_type_of_the_table_is_among_the_examples() -> None:
    assert {example.kind for example in EXAMPLES.values()} == set(ADAPTERS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_inspect_reads_a_file_of_every_type(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    path = tmp_path / "a.safetensors"
    save_file({f"{TO_K}.{part}": tensor.float().contiguous() for part, tensor in example.tensors().items()}, path)
    inspection = inspect_file(path)
    (module,) = inspection.modules
    assert not module.fault and (module.used is None) == ("dora" in name)
    assert ("used  " in describe(inspection)) == ("dora" not in name)
    json.dumps(as_json(inspection), allow_nan=False)


def test_a_broken_module_leaves_the_others_told(tmp_path: Path) -> None:
    modules = random_lora()
    write_adapter(tmp_path / "a.safetensors", modules, {}, "fp32")
    tensors = load_file(tmp_path / "a.safetensors")
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key][0] = math.nan
    save_file(tensors, tmp_path / "b.safetensors")
    inspection = inspect_file(tmp_path / "b.safetensors")
    assert sum(module.used is None for module in inspection.modules) == 1 and inspection.used is not None
    assert "1 modules left out" in describe(inspection)
    json.dumps(as_json(inspection), allow_nan=False)
