"""`impasto merge` of LoRA files: the sum is exact, a lower rank tells its true error, and what cannot be added is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import impasto
from tests.formats.examples import random_weights, split_file
from tests.tools.mergeable import MIXED, PLAIN, save_adapter
from trainers.errors import AdapterFileError
from trainers.formats import ModuleWeights, read_without_base, write_adapter
from trainers.tools.inspect_file import inspect_file
from trainers.tools.merge import Merged, merge_adapters

Deltas = dict[str, torch.Tensor]
ONLY_A = {"attn1.to_out.0": "lora"}


@pytest.fixture(scope="module")
def pair(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRAs of different ranks and alphas; the first has layers that the second has not."""
    folder = tmp_path_factory.mktemp("pair")
    first = save_adapter(folder / "a.safetensors", tiny_base, PLAIN | ONLY_A, rank=3, alpha=2.0, seed=1)
    return first, save_adapter(folder / "b.safetensors", tiny_base, PLAIN, rank=5, alpha=7.0, seed=2)


def deltas(path: Path) -> Deltas:
    return {name: weights.delta() for name, weights in read_without_base(path, "sd1").modules.items()}


def blended(*files: tuple[Path, float]) -> Deltas:
    total: Deltas = {}
    for path, strength in files:
        for name, delta in deltas(path).items():
            total[name] = total.get(name, torch.zeros_like(delta)) + strength * delta
    return total


def error(made: Deltas, wanted: Deltas) -> tuple[float, float]:
    """(worst, overall) relative Frobenius error."""
    assert made.keys() == wanted.keys()
    lost = {name: float((made[name] - wanted[name]).norm()) for name in wanted}
    worst = max(lost[name] / float(wanted[name].norm()) for name in wanted)
    whole = sum(float(delta.norm()) ** 2 for delta in wanted.values()) ** 0.5
    return worst, sum(value**2 for value in lost.values()) ** 0.5 / whole


def merge(tmp_path: Path, *files: tuple[Path, float], **options: object) -> tuple[Path, Merged]:
    output = tmp_path / "merged.safetensors"
    return output, merge_adapters(files, output, family="sd1", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_a_sum_is_the_two_blended_to_a_millionth(pair: tuple[Path, Path], form: str, tmp_path: Path) -> None:
    files = ((pair[0], 0.7), (pair[1], -0.4))
    output, done = merge(tmp_path, *files, form=form)
    worst, overall = error(deltas(output), blended(*files))
    assert worst < 1e-6
    assert (done.worst_error, done.overall_error) == (pytest.approx(worst), pytest.approx(overall))
    ranks = {name: weights.rank for name, weights in read_without_base(output, "sd1").modules.items()}
    assert {rank for name, rank in ranks.items() if name.endswith("attn1.to_out.0")} == {3}
    assert done.ranks == (3, 8) and set(ranks.values()) == {3, 8}


def test_half_precision_keeps_strengths_of_any_size(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A factor of 1e-5 times a strength of 0.01 would vanish in fp16, were it not shared out between up and down."""
    small = {
        name: ModuleWeights({"down": w.factors["down"], "up": w.factors["up"] * 1e-4}, w.alpha)
        for name, w in read_without_base(pair[0], "sd1").modules.items()
    }
    write_adapter(tmp_path / "small.safetensors", small, {}, "fp32")
    files = ((tmp_path / "small.safetensors", -0.01), (pair[1], 4.0))
    output, done = merge(tmp_path, *files, dtype="fp16")
    made, wanted = deltas(output), blended(*files)
    assert done.worst_error == pytest.approx(error(made, wanted)[0]) and done.worst_error < 1e-3
    assert {tensor.dtype for key, tensor in load_file(output).items() if not key.endswith("alpha")} == {torch.float16}


def test_a_file_alone_is_baked_at_its_strength(pair: tuple[Path, Path], tmp_path: Path) -> None:
    output, _ = merge(tmp_path, (pair[0], 0.6))
    assert error(deltas(output), blended((pair[0], 0.6)))[0] < 1e-6
    assert read_without_base(output, "sd1").metadata["ss_network_dim"] == "3"


def test_the_same_file_twice_is_twice_the_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    output, _ = merge(tmp_path, (pair[0], 0.5), (pair[0], 0.5))
    assert error(deltas(output), deltas(pair[0]))[0] < 1e-6


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_error_of_a_lower_rank_is_the_true_one_and_the_least(pair: tuple[Path, Path], dtype: str, tmp_path: Path) -> None:
    files = ((pair[0], 0.7), (pair[1], -0.4))
    output, done = merge(tmp_path, *files, rank=4, dtype=dtype)
    made, wanted = deltas(output), blended(*files)
    worst, overall = error(made, wanted)
    assert done.worst_error == pytest.approx(worst, rel=1e-6) and done.overall_error == pytest.approx(overall, rel=1e-6)
    assert worst > 0.05 and f"{worst:.2g}" in str(done) and f"{overall:.2g}" in str(done)
    for name, delta in wanted.items():
        left = torch.linalg.svdvals(delta.flatten(1))[4:].norm()
        least = float(left) if left > 1e-6 * delta.norm() else 0.0
        assert float((made[name] - delta).norm()) == pytest.approx(least, rel=1e-3, abs=1e-3 * float(delta.norm())), name
    assert max(w.rank for w in read_without_base(output, "sd1").modules.values()) == 4


def test_with_a_rank_other_types_are_added_too(tiny_base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "loha.safetensors", tiny_base, {"attn1.to_q": "loha"}, rank=2, seed=3)
    with pytest.raises(AdapterFileError, match=r"is a loha.*--rank N.*convert --plain-lora"):
        merge(tmp_path, (pair[0], 1.0), (other, 0.5))
    output, done = merge(tmp_path, (pair[0], 1.0), (other, 0.5), rank=7)
    # The product of two rank-2 matrices entry by entry has rank 4: with 3 of the other LoRA that is all of it.
    assert error(deltas(output), blended((pair[0], 1.0), (other, 0.5)))[0] < 1e-6 and done.worst_error < 1e-6


def test_what_cancels_leaves_no_noise_behind(pair: tuple[Path, Path], tmp_path: Path) -> None:
    output, _ = merge(tmp_path, (pair[0], 1.0), (pair[0], -1.0), rank=2)
    assert all(float(delta.norm()) == 0 for delta in deltas(output).values())


def test_the_metadata_tell_of_both_and_of_no_disk(pair: tuple[Path, Path], tmp_path: Path) -> None:
    output, _ = merge(tmp_path, (pair[0], 0.7), (pair[1], -0.4))
    told = split_file(output)[0]["__metadata__"]
    assert told["modelspec.merged_from"] == "a, b" and "a at 0.7, b at -0.4" in told["modelspec.description"]
    assert told["modelspec.trigger_phrase"] == "word1, word2"
    assert (told["ss_network_dim"], told["ss_base_model_version"]) == ("Dynamic", "sd_v1")
    alphas = {float(tensor) for key, tensor in load_file(output).items() if key.endswith("alpha")}
    assert {float(told["ss_network_alpha"])} == alphas
    assert str(tmp_path).encode() not in output.read_bytes() and str(pair[0].parent).encode() not in output.read_bytes()
    assert [problem for problem in inspect_file(output).problems if problem.severity == "error"] == []


def test_what_cannot_be_added_up_is_refused_and_nothing_is_written(
    tiny_base: Path, tiny_sdxl_base: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = save_adapter(tmp_path / "xl.safetensors", tiny_sdxl_base, PLAIN)
    output = tmp_path / "out.safetensors"
    sd1 = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": random_weights((32, 768), 2, 2.0, 0)}
    write_adapter(tmp_path / "told.safetensors", sd1, {}, "fp32")
    with pytest.raises(AdapterFileError, match=r"told.safetensors was made for .* 1.x, xl.safetensors for .* XL"):
        merge_adapters([(tmp_path / "told.safetensors", 1.0), (other, 1.0)], output)
    write_adapter(tmp_path / "mute.safetensors", read_without_base(pair[0], "sd1").modules, {}, "fp32")
    with pytest.raises(AdapterFileError, match="--family"):
        merge_adapters([(tmp_path / "mute.safetensors", 1.0)], output)
    dora = save_adapter(tmp_path / "dora.safetensors", tiny_base, MIXED)
    with pytest.raises(AdapterFileError, match=r"is a DoRA.*--base"):
        merge_adapters([(dora, 1.0)], output, rank=4, family="sd1")
    name = next(iter(sd1))
    write_adapter(tmp_path / "wide.safetensors", {name: random_weights((32, 48), 2, 2.0, 0)}, {}, "fp32")
    with pytest.raises(AdapterFileError, match=r"is \(32, 48\) here and \(32, 32\)"):
        merge_adapters([(pair[0], 1.0), (tmp_path / "wide.safetensors", 1.0)], output, family="sd1")
    assert not output.exists()
    output.write_bytes(b"mine")
    with pytest.raises(AdapterFileError, match="already"):
        merge_adapters([(pair[0], 1.0)], output, family="sd1")
    assert output.read_bytes() == b"mine"


def test_the_command_merges_and_refuses_options_that_mean_nothing(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sum.safetensors"
    assert impasto("merge", f"{pair[0]}:0.7", f"{pair[1]}:-0.4", "--output", output) == 0
    assert "rank 3 to 8" in capsys.readouterr().out
    assert error(deltas(output), blended((pair[0], 0.7), (pair[1], -0.4)))[0] < 1e-6
    for words in ([], [pair[0], "--vae", "x"], [pair[0], "--base", "pocket", "--rank", 4], [f"{pair[0]}:much"], ["gone"]):
        assert impasto("merge", *words, "--output", tmp_path / "none.safetensors") == 2
        assert capsys.readouterr().err.startswith("impasto: ")
    assert not (tmp_path / "none.safetensors").exists()
