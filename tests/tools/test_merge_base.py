"""`impasto merge --base`: the merged base draws without a LoRA what the base draws with it, in either layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import impasto
from tests.tools.mergeable import MIXED, PLAIN, save_adapter
from trainers.draw import attach_files
from trainers.errors import AdapterFileError, BaseModelError
from trainers.families import load_family, recognise_base
from trainers.families.base import DiffusionModel
from trainers.formats.base_file import write_base
from trainers.generate import Picture, RenderSettings, render_latents
from trainers.tools.merge import merge_adapters
from trainers.tools.merge_base import MergedBase, merge_into_base

HOW = RenderSettings(32, 32, steps=2, guidance=3.0)
STRENGTHS = (0.7, -0.4)


def load(base: Path) -> Any:
    return load_family(recognise_base(str(base)), torch.float32, torch.device("cpu"))


def drawn(model: DiffusionModel, strengths: dict[str, float] | None = None) -> torch.Tensor:
    """The picture (3, 32, 32) of a fixed prompt and seed, in [-1, 1] but for what a random decoder makes beyond."""
    latents = render_latents(model, [Picture("a photo of a cat", 3, strengths or {})], HOW)
    return model.decode_latents(latents)[0]


def merge(base: Path, output: Path, *files: tuple[Path, float], **options: Any) -> tuple[MergedBase, list[str]]:
    told: list[str] = []
    return merge_into_base(files, recognise_base(str(base)), output, tell=told.append, **options), told


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def case(
    request: pytest.FixtureRequest, tiny_base: Path, tiny_sdxl_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A base, a file of several types with the text encoders trained, a plain LoRA, and the picture with both."""
    base, folder = {"sd1": tiny_base, "sdxl": tiny_sdxl_base}[request.param], tmp_path_factory.mktemp("case")
    first = save_adapter(folder / "mixed.safetensors", base, MIXED, rank=3, alpha=2.0, seed=1)
    second = save_adapter(folder / "plain.safetensors", base, PLAIN, rank=2, alpha=5.0, seed=2)
    model = load(base)
    names = attach_files(model, [first, second], lambda remark: pytest.fail(remark))
    without = drawn(model)
    both = drawn(model, dict(zip(names, STRENGTHS, strict=True)))
    assert float((both - without).abs().max()) > 0.05, "it is seen"
    return {"base": base, "files": ((first, STRENGTHS[0]), (second, STRENGTHS[1])), "picture": both, "without": without}


@pytest.mark.parametrize("layout", ["merged.safetensors", "merged"])
def test_the_merged_base_draws_what_base_and_adapters_draw(case: dict[str, Any], layout: str, tmp_path: Path) -> None:
    done, told = merge(case["base"], tmp_path / layout, *case["files"])
    assert float((drawn(load(tmp_path / layout)) - case["picture"]).abs().max()) < 1e-4
    assert told == [] and [(count, total) for *_, count, total in done.files] == [
        (len(modules), len(modules)) for modules in ([*_modules(path)] for path, _ in case["files"])
    ]
    assert done.layout in str(done) and "at 0.7" in str(done)


def _modules(path: Path) -> set[str]:
    return {key.partition(".")[0] for key in load_file(path)}


def test_a_single_file_is_merged_into_as_its_folder_is(case: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit: q, k and v that lie fused in the file are changed as those that lie apart."""
    write_base(recognise_base(str(case["base"])), tmp_path / "base.safetensors")
    for name, base in (("a", tmp_path / "base.safetensors"), ("b", case["base"])):
        merge(base, tmp_path / f"{name}.safetensors", *case["files"])
    one, other = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_sum_in_one_file_draws_what_the_two_draw_blended(tiny_base: Path, tmp_path: Path) -> None:
    files = [save_adapter(tmp_path / f"{n}.safetensors", tiny_base, PLAIN, rank=n, alpha=3.0, seed=n) for n in (2, 4)]
    merge_adapters(list(zip(files, STRENGTHS, strict=True)), tmp_path / "sum.safetensors", family="sd1")
    model = load(tiny_base)
    names = attach_files(model, [*files, tmp_path / "sum.safetensors"], lambda remark: pytest.fail(remark))
    blended = drawn(model, dict(zip(names, (*STRENGTHS, 0.0), strict=True)))
    assert float((drawn(model, {names[2]: 1.0}) - blended).abs().max()) < 1e-4
    assert float((drawn(model) - blended).abs().max()) > 0.05


def test_sums_of_many_are_rounded_once(tiny_base: Path, tmp_path: Path) -> None:
    """A file and its opposite leave the base's bits, which no chain of roundings would."""
    lora = save_adapter(tmp_path / "a.safetensors", tiny_base, PLAIN, seed=1)
    merge(tiny_base, tmp_path / "out", (lora, 0.7), (lora, -0.7))
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        made, base = (load_file(folder / f"{part}.safetensors") for folder in (tmp_path / "out", tiny_base))
        base = {key if part.startswith("unet") else f"text_model.{key.removeprefix('text_model.')}": base[key] for key in base}
        assert made.keys() == base.keys() and all(torch.equal(made[key], base[key]) for key in base)


def test_rounding_to_the_stored_format_is_measured_and_told(tiny_base: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    write_base(recognise_base(str(tiny_base)), half, dtype="fp16")
    lora = save_adapter(tmp_path / "a.safetensors", tiny_base, PLAIN, seed=1)
    done, told = merge(half, tmp_path / "kept.safetensors", (lora, 0.1))
    assert len(told) == 1 and "fp16" in told[0] and "--dtype fp32" in told[0] and f"{done.rounding:.1%}" in told[0]
    whole, told = merge(half, tmp_path / "wide.safetensors", (lora, 0.1), dtype="fp32")
    assert told == [] and whole.rounding == 0
    before, kept, wide = (load_file(tmp_path / f"{name}.safetensors") for name in ("half", "kept", "wide"))
    assert {kept[key].dtype for key in kept if kept[key].is_floating_point()} == {torch.float16}
    lost = sum(float((kept[key].double() - wide[key].double()).pow(2).sum()) for key in kept) ** 0.5
    changed = sum(float((wide[key].double() - before[key].double()).pow(2).sum()) for key in kept) ** 0.5
    assert done.rounding == pytest.approx(lost / changed, rel=1e-3) and done.rounding > 1e-4


def test_what_a_number_format_cannot_hold_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    lora = save_adapter(tmp_path / "a.safetensors", tiny_base, PLAIN, alpha=1e7)
    with pytest.raises(BaseModelError, match="too large"):
        merge(tiny_base, tmp_path / "out", (lora, 4.0), dtype="fp16")
    with pytest.raises(BaseModelError, match="too large"):
        merge(tiny_base, tmp_path / "out.safetensors", (lora, 4.0), dtype="fp16")
    merge(tiny_base, tmp_path / "wide.safetensors", (lora, 4.0))
    with pytest.raises(BaseModelError, match="too large for fp16"):
        merge(tmp_path / "wide.safetensors", tmp_path / "out.safetensors", dtype="fp16")
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "wide.safetensors"}


def test_modules_that_the_base_has_not_are_counted(tiny_base: Path, tmp_path: Path) -> None:
    from tests.test_draw import save_lora

    lora = save_lora(tmp_path / "odd.safetensors", "unet.up_blocks.7.to_q")
    done, told = merge(tiny_base, tmp_path / "out.safetensors", (lora, 1.0))
    assert done.files == (("odd.safetensors", 1.0, 1, 2),) and "1 of 2 modules of odd.safetensors at 1" in str(done)
    assert told == ["1 of 2 modules of odd.safetensors are not in this base, for example lora_unet_up_blocks_7_to_q."]


def test_the_file_tells_what_it_was_made_of(tiny_base: Path, tmp_path: Path) -> None:
    from trainers.families.stored import metadata_of

    lora = save_adapter(tmp_path / "a.safetensors", tiny_base, PLAIN)
    merge(tiny_base, tmp_path / "mine.safetensors", (lora, 0.5))
    told = metadata_of(tmp_path / "mine.safetensors")
    assert (told["modelspec.title"], told["modelspec.merged_from"]) == ("mine", "tiny, a")
    assert str(tmp_path) not in "".join(told.values())


def test_the_command_converts_a_layout_and_refuses_what_it_cannot_do(
    tiny_base: Path, tiny_sdxl_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "one.safetensors"
    assert impasto("merge", "--base", tiny_base, "--output", output) == 0
    assert "single file" in capsys.readouterr().out
    assert impasto("merge", "--base", output, "--output", tmp_path / "folder") == 0
    assert load(tmp_path / "folder").fingerprint("unet") == load(tiny_base).fingerprint("unet")
    before = output.read_bytes()
    lora = save_adapter(tmp_path / "a.safetensors", tiny_sdxl_base, PLAIN)
    for words in (("--output", output), ("--output", tmp_path / "x.ckpt"), (lora, "--output", tmp_path / "x")):
        assert impasto("merge", "--base", tiny_base, *words) == 2
    assert impasto("merge", "--base", tmp_path / "folder", "--output", tmp_path / "folder") == 2
    assert output.read_bytes() == before and not list(tmp_path.glob("x*"))
    with pytest.raises(AdapterFileError, match="XL"):
        merge(tiny_base, tmp_path / "x", (lora, 1.0))
