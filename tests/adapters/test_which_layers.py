"""Which layers learn, at which rank and alpha: patterns and projections, from the settings to the file."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.command_line import TINY, impasto, result_of
from tests.tiny_runs import exported, tiny_config
from trainers.adapters.inject import inject_trainable
from trainers.adapters.layer import answer_together
from trainers.adapters.lora import LORA
from trainers.adapters.plan import LayerPlan, fitting
from trainers.attention import share_rows
from trainers.checks import check_settings
from trainers.config import parse_override, read_config, write_config
from trainers.errors import SettingError
from trainers.export import Exported, _own_facts, _told_of
from trainers.families import recognise_base
from trainers.formats import ModuleWeights
from trainers.frozen import KeptLayer
from trainers.layers import adapter_size, check_patterns, planned_layers
from trainers.presets import resolve
from trainers.run_folder import RunFolder

NAME = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"


@pytest.mark.parametrize(
    "pattern", ["to_out", "to_out.0", "attn2", "attn*.to_*", "down_blocks.0", "unet", "down_blocks.*.to_out", NAME]
)
def test_a_pattern_is_whole_parts_of_a_name(pattern: str) -> None:
    assert fitting(["mid_block", pattern], NAME) == [pattern]


@pytest.mark.parametrize("pattern", ["out", "to_ou", "attn", "down_blocks.1", "attn2.to_q", "blocks.0", "TO_OUT"])
def test_a_pattern_that_ends_within_a_part_fits_not(pattern: str) -> None:
    assert not fitting([pattern], NAME)


def planned(base: Path, *settings: str) -> dict[str, tuple[int, float]]:
    config = tiny_config(base, Path("pictures"), "adapter.rank=4", *settings)
    return {plan.name: (plan.rank, plan.scale) for plan in planned_layers(config, recognise_base(str(base)))}


def test_the_longest_pattern_that_fits_counts_and_alpha_follows_the_rank_unless_it_is_said(tiny_base: Path) -> None:
    ranks = 'adapter.rank_pattern={to_q=6, "attn2.to_q"=2, q_proj=3}'
    found = planned(tiny_base, ranks, "adapter.alpha_pattern={to_k=1, q_proj=6}")
    last = {name: value for name, value in found.items() if ".attentions.0." in name or ".layers.0." in name}
    ends = {name.rpartition("s.0.")[2]: value for name, value in last.items()}
    assert ends["attn1.to_q"] == (6, 1.0) and ends["attn2.to_q"] == (2, 1.0)
    assert ends["attn1.to_k"] == ends["attn2.to_k"] == (4, 0.25) and ends["attn1.to_v"] == (4, 1.0)
    assert ends["self_attn.q_proj"] == (3, 2.0) and ends["self_attn.k_proj"] == (4, 1.0)
    roots = planned(tiny_base, ranks, "adapter.scaling=rslora", "adapter.alpha=8")
    assert {value[1] for name, value in roots.items() if name.endswith("attn2.to_q")} == {8 / 2**0.5}


def test_the_order_of_patterns_says_nothing_as_no_file_keeps_it(tiny_base: Path, tmp_path: Path) -> None:
    """TOML reads `attn2.to_q`, `to_q`, `attn2.to_k` as the two of attn2 and then the other, and a preset's stay in front."""
    lines = ["attn2.to_q = 2", "to_q = 6", "attn2.to_k = 3", "'attn*.to_k' = 5"]
    facts, seen = recognise_base(str(tiny_base)), []
    for written in itertools.permutations(lines):
        preset = tmp_path / "own.toml"
        preset.write_text("\n".join(["[adapter.rank_pattern]", *written]), encoding="utf-8")
        given = {"base": {"model": str(tiny_base)}, "dataset": {"images": "pictures"}}
        config = resolve(str(preset), given, ["adapter.rank=4", "adapter.rank_pattern.to_v=7"])
        (tmp_path / "config.toml").write_text(write_config(config), encoding="utf-8")
        again = read_config(tmp_path / "config.toml")
        assert again == config
        seen += [planned_layers(one, facts) for one in (config, again)]
        assert not check_patterns(again, facts)
    assert all(plans == seen[0] for plans in seen)
    ranks = {plan.name.rpartition("blocks.0.")[2]: plan.rank for plan in seen[0] if ".0.transformer_blocks.0." in plan.name}
    own = {name: rank for name, rank in ranks.items() if name.endswith(("to_q", "to_k", "to_v"))}
    assert own == {"attn1.to_q": 6, "attn1.to_k": 5, "attn1.to_v": 7, "attn2.to_q": 2, "attn2.to_k": 3, "attn2.to_v": 7}


def test_q_and_v_at_double_rank_have_as_many_numbers_as_q_k_v_and_out(tiny_base: Path) -> None:
    """Both ways of saying it, against all four at the rank itself."""
    facts = recognise_base(str(tiny_base))
    words = ("text_encoder.learning_rate=0", 'adapter.targets=["self_attention"]')
    sizes = {}
    for name, more in {"all": (), "q and v": ('adapter.projections=["q", "v"]', "adapter.rank=8")}.items():
        config = tiny_config(tiny_base, Path("pictures"), "adapter.rank=4", *words, *more)
        sizes[name] = adapter_size(config, facts)
    assert sizes["q and v"].layers * 2 == sizes["all"].layers
    assert sizes["q and v"].parameters == sizes["all"].parameters
    double = planned(tiny_base, *words, "adapter.rank_pattern={to_q=8, to_v=8}")
    assert {name.rpartition(".attn1.")[2]: rank for name, (rank, _) in double.items()} == {
        "to_q": 8, "to_k": 4, "to_v": 8, "to_out.0": 4,
    }  # fmt: skip


def test_projections_leave_other_layers_alone_and_count_in_the_text_encoder_too(tiny_base: Path) -> None:
    everything = planned(tiny_base, 'adapter.targets=["attention", "feed_forward", "convolutions"]')
    some = planned(tiny_base, 'adapter.targets=["attention", "feed_forward", "convolutions"]', 'adapter.projections=["out"]')
    gone = {name.rpartition(".")[2] for name in everything.keys() - some.keys()}
    assert gone == {"to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj"}
    assert all(not name.endswith(tuple(gone)) for name in some)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("adapter.rank_pattern={to_qq=4}", r"fits none of the \d+ layers.*to_q"),
        ("adapter.alpha_pattern={attn3=4}", "fits none.*attn1, attn2|attn2, attn1"),
        ("adapter.rank_pattern={conv1=4}", "fits none"),  # there, but it does not learn
        ('adapter.rank_pattern={"attn1.*"=4, attn1=3}', "'attn1' is never used: longer ones"),
        ('adapter.rank_pattern={"attn1.*_q"=4, "attn*1.to_q"=6, "attn1.to*_q"=8}', "same length and fit the same layers"),
        ("adapter.rank_pattern={to_q=0}", r"adapter\.rank_pattern\.to_q.*greater than or equal to 1"),
        ("adapter.rank_pattern={to_q=many}", r"adapter\.rank_pattern"),
        ("adapter.projections=[]", "at least one of q, k, v"),
    ],
)
def test_a_pattern_without_use_is_refused_in_words(
    setting: str, said: str, tiny_base: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["train", pictures, "--base", tiny_base, *TINY, "--set", setting, "-o", tmp_path / "run"]
    assert impasto(*words) in (1, 2)
    told = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert re.search(said, told), told


def test_patterns_of_one_length_that_say_the_same_are_no_fault(tiny_base: Path) -> None:
    """attentions and attn2.to_q are ten letters long, and both fit some layers."""
    for rank, faults in ((4, 0), (5, 1)):
        config = tiny_config(tiny_base, Path("pictures"), f'adapter.rank_pattern={{attentions=4, "attn2.to_q"={rank}}}')
        assert len(check_patterns(config, recognise_base(str(tiny_base)))) == faults


def test_a_rank_above_a_layers_width_is_told(tiny_base: Path) -> None:
    config = tiny_config(tiny_base, Path("pictures"), "adapter.rank_pattern={to_q=999}")
    (problem,) = [one for one in check_settings(config, recognise_base(str(tiny_base))) if one.where == "adapter.rank_pattern"]
    assert problem.severity == "advice" and "999" in problem.what


def test_each_part_of_a_file_is_held_against_its_own_rank(tiny_base: Path) -> None:
    config = tiny_config(tiny_base, Path("pictures"), "text_encoder.rank=4", "adapter.dropout=0.1")
    rank = {number: ModuleWeights({"up": torch.ones(8, number), "down": torch.ones(number, 8)}, 2.0) for number in (2, 4)}
    assert _own_facts(Exported({"unet.a": rank[2], "text_encoder.a": rank[4]}), config) == {}
    facts = _own_facts(Exported({"unet.a": rank[4], "text_encoder.a": rank[4]}), config)
    assert facts == {"ss_network_dim": "4", "ss_network_alpha": "2.0"}
    assert _told_of(config) == {"dropout": 0.1}


def test_a_pattern_where_no_layer_learns_is_told(tiny_base: Path) -> None:
    config = tiny_config(
        tiny_base, Path("pictures"), "adapter.type=pivotal", "adapter.lora=false", "adapter.rank_pattern={to_q=4}"
    )
    (problem,) = [one for one in check_settings(config, recognise_base(str(tiny_base))) if one.where == "adapter.rank_pattern"]
    assert problem.severity == "error" and problem.hint.startswith("Take it out: no layer gets an adapter")


def test_full_fine_tuning_has_no_rank_to_judge_and_no_file_in_peft_form(tiny_base: Path) -> None:
    def told(*settings: str) -> list[tuple[str, str]]:
        config = tiny_config(tiny_base, Path("pictures"), "adapter.type=full", *settings)
        return [(one.severity, one.where) for one in check_settings(config, recognise_base(str(tiny_base)))]

    wheres = [where for _, where in told("adapter.rank=1000", "optimizer.learning_rate=1e-7", "adapter.alpha=1")]
    assert not {"adapter.rank", "adapter.alpha", "optimizer.learning_rate"} & set(wheres)
    assert ("error", "output.kind") in told("output.form=peft", "output.kind=native")
    for setting in ("adapter.rank_pattern={to_q=4}", "adapter.scaling=rslora"):
        with pytest.raises(SettingError, match="has no rank"):
            told(setting)


def test_dots_without_quotes_are_part_of_the_pattern() -> None:
    loose = resolve("pocket", {}, ["adapter.rank_pattern.attn2.to_q=8", "adapter.rank_pattern.to_v=4"])
    assert loose.adapter.rank_pattern == {"attn2.to_q": 8, "to_v": 4}
    assert parse_override('adapter.rank_pattern={"attn2.*"=8}') == {"adapter": {"rank_pattern": {"attn2.*": 8}}}


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_the_file_has_each_modules_rank_and_alpha_and_is_proven(
    form: str, tiny_base: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ("adapter.rank_pattern={to_q=6, fc1=2}", "adapter.alpha_pattern={to_q=3, to_v=8}", f"output.form={form}")
    more = [
        word
        for setting in (*settings, "adapter.alpha=4", "output.verify=true", "optimizer.learning_rate=1e-2")
        for word in ("--set", setting)
    ]
    assert impasto("train", pictures, "--base", tiny_base, *TINY, "--steps", 2, *more, "-o", tmp_path / "run") == 0
    assert " layers at rank 6, " in capfd.readouterr().out
    proof = json.loads(RunFolder(tmp_path / "run").proof.read_text(encoding="utf-8"))
    assert proof["ok"] and proof["read_by_diffusers"] == proof["modules"]
    with safe_open(result_of(tmp_path / "run"), "pt") as file:
        metadata, shapes = file.metadata(), {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        if form == "kohya":
            names = {key.removesuffix(".alpha") for key in shapes if key.endswith(".alpha")}
            ranks = {name: shapes[f"{name}.lora_down.weight"][0] for name in names}
            assert ranks == {name: 6 if name.endswith("to_q") else 2 if name.endswith("fc1") else 4 for name in names}
            # diffusers reads one alpha of a part, so the others' ratio to it lies in `up`: the proof has compared the products.
            assert {float(file.get_tensor(f"{name}.alpha")) for name in names} == {4.0}
            assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"
            assert json.loads(metadata["ss_network_args"])["rank_pattern"] == {"to_q": 6, "fc1": 2}
        else:
            told = json.loads(metadata["lora_adapter_metadata"])
            assert told["unet.r"] == 4 and set(told["unet.rank_pattern"].values()) == {6}
            assert all(name.endswith("to_q") for name in told["unet.rank_pattern"])


def test_what_is_exported_has_the_alphas_of_the_patterns(start: Any) -> None:
    settings = ("adapter.rank=4", "adapter.alpha=4", "adapter.rank_pattern={to_q=6}", "adapter.alpha_pattern={to_q=3, to_v=8}")
    found = {(name.rpartition(".")[2], one.rank, one.alpha) for name, one in exported(start(*settings)).modules.items()}
    unet = {one for one in found if one[0].startswith("to_") or one[0] == "0"}
    assert unet == {("to_q", 6, 3.0), ("to_v", 4, 8.0), ("to_k", 4, 4.0), ("0", 4, 4.0)}


def merged_delta(learns: tuple[bool, bool, bool], factors: list[dict[str, torch.Tensor]], scale: float) -> torch.Tensor:
    """loralib's MergedLinear (enable_lora): one stacked A, B as a grouped 1x1 convolution, zeros where nothing learns."""
    on = [factor for factor, learning in zip(factors, learns, strict=True) if learning]
    downs, ups = torch.cat([one["down"] for one in on]), torch.cat([one["up"] for one in on])
    rows = torch.nn.functional.conv1d(downs[None], ups[..., None], groups=len(on))[0]
    whole = rows.new_zeros(3, rows.shape[0] // len(on), rows.shape[1])
    whole[list(learns)] = rows.view(len(on), -1, rows.shape[1])
    return scale * whole.flatten(0, 1)


@pytest.mark.parametrize("learns", [(True, False, True), (False, True, False), (True, True, True)])
def test_some_of_merged_q_k_v_learn_as_in_loralib(learns: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The three grouped, in one node, against the merged formula: answer and gradients in float64."""
    attention, names = nn.Module(), ["to_q", "to_k", "to_v"]
    generator = torch.Generator().manual_seed(3)
    for name in names:
        layer = nn.Linear(8, 6, bias=False).double().requires_grad_(False)
        layer.weight.copy_(torch.randn(6, 8, generator=generator))
        setattr(attention, name, layer)
    weight = torch.cat([getattr(attention, name).weight for name in names])
    share_rows(attention, names, KeptLayer)
    on = [name for name, learning in zip(names, learns, strict=True) if learning]
    plans = [LayerPlan(f"unet.{name}", 2, 0.5, "unet") for name in on]
    flat = inject_trainable({"unet": attention}, plans, LORA, 0, torch.device("cpu"))
    flat.weights.normal_(generator=generator)
    used = {
        name: {part: view.detach().double().requires_grad_() for part, view in flat.views[f"unet.{name}"].items()}
        for name in on
    }
    for name in on:
        flat.used[f"unet.{name}"].update(used[name])
    x = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    calls = []
    joined = LORA.joined
    monkeypatch.setattr(type(LORA), "joined", staticmethod(lambda *given: calls.append(1) or joined(*given)))
    found = answer_together([getattr(attention, name) for name in names], x)
    assert len(found) == len(calls) == 1  # one node, which reads x once
    factors = [used.get(name, {}) for name in names]
    wanted = torch.nn.functional.linear(x, weight + merged_delta(learns, factors, 0.5))
    torch.testing.assert_close(found[0], wanted, rtol=1e-12, atol=1e-12)
    leaves = [x, *(factor for own in used.values() for factor in own.values())]
    given = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(found[0], leaves, given), torch.autograd.grad(wanted, leaves, given), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beside", [True, False])
def test_a_base_saved_with_fused_projections(
    beside: bool, tiny_base: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """diffusers' fuse_qkv_projections saves to_qkv beside the three, which are trained; without them it is refused by names."""
    base = tmp_path / "fused"
    shutil.copytree(tiny_base, base)
    (file,) = (base / "unet").glob("*.safetensors")
    tensors = load_file(file)
    for key in [key for key in tensors if key.endswith("attn1.to_q.weight")]:
        names = [key.replace("to_q", name) for name in ("to_q", "to_k", "to_v")]
        tensors[key.replace("to_q", "to_qkv")] = torch.cat([tensors[name] if beside else tensors.pop(name) for name in names])
    save_file(tensors, file)
    words: list[Any] = ["train", pictures, "--base", base, *TINY, "--steps", 1, "-o", tmp_path / "run"]
    code, told = impasto(*words), capfd.readouterr()
    if beside:
        assert code == 0, told.err
        with safe_open(result_of(tmp_path / "run"), "pt") as written:
            assert not any("to_qkv" in key for key in written.keys())  # noqa: SIM118
    else:
        assert code == 1 and "attn1.to_" in told.out + told.err
