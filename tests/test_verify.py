"""The proof of a file: green for what was trained, red for five files made wrong, in a run folder and without one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.test_cli import impasto
from tests.tiny_runs import exported, shake, tiny_config, tiny_training
from trainers.config import write_config
from trainers.errors import AdapterFileError
from trainers.export import export_adapter
from trainers.families import BaseOptions
from trainers.formats import ModuleWeights
from trainers.run_folder import RunFolder
from trainers.tools.verify_file import verify_file
from trainers.train import train
from trainers.verify import Proof, verify

SMALL = ("train.steps=2", "samples.every=0", "text_encoder.learning_rate=0.01", "optimizer.learning_rate=0.01")


def full_run(base: Path, pictures: Path, run: Path, *overrides: str) -> tuple[RunFolder, list[Any]]:
    run.mkdir(parents=True)
    folder, told = RunFolder(run), []
    folder.config.write_text(write_config(tiny_config(base, pictures, *SMALL, *overrides)), encoding="utf-8")
    assert train(folder, told.append)
    return folder, told


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    from tests.conftest import make_pictures

    place = tmp_path_factory.mktemp("proven")
    return full_run(tiny_base, make_pictures(place / "pictures"), place / "run")[0]


def test_a_run_ends_with_the_proof_of_its_file(run: RunFolder) -> None:
    proof = json.loads(run.proof.read_text(encoding="utf-8"))
    assert proof["ok"] and proof["modules"] == proof["read_by_diffusers"] == proof["read_here"] == sum(proof["parts"].values())
    assert set(proof["parts"]) == {"unet", "text_encoder"} and proof["against"] == "what was trained"
    assert 0 < proof["worst_error"] < 1e-3 and proof["pixel_difference"] == 0 and proof["picture_error"] < 1e-3


def test_inspect_proves_a_file_by_the_run_it_lies_in(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.result is not None
    assert impasto("inspect", run.result, "--verify") == 0
    said = capsys.readouterr().out
    assert "against what was trained" in said and "verified" in said and "FAILED" not in said


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet and text"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_every_family_is_read_whole(
    family: str,
    text: bool,
    dtype: str,
    tiny_base: Path,
    tiny_sd2_base: Path,
    tiny_sdxl_base: Path,
    pictures: Path,
    tmp_path: Path,
) -> None:
    base = {"sd1": tiny_base, "sd2": tiny_sd2_base, "sdxl": tiny_sdxl_base}[family]
    targets = 'adapter.targets=["attention","feed_forward","projections","convolutions"]'
    rate = "text_encoder.learning_rate=" + ("0.01" if text else "0")
    training = tiny_training(base, pictures, tmp_path / "run", targets, rate, f"output.dtype={dtype}", "adapter.alpha=3.5")
    shake(training)
    modules = exported(training).modules
    path = tmp_path / "x.safetensors"
    export_adapter(
        path,
        exported(training),
        training.config,
        {},
        family,
    )
    training.take_out()
    proof = verify(training.model, path, modules, "a cat")
    assert proof.problems == () and len(modules) == proof.read_by_diffusers == proof.read_here == proof.modules
    assert proof.worst_error is not None and proof.worst_error < {"fp32": 1e-6, "fp16": 1e-3}[dtype]
    assert proof.pixel_difference == 0 or proof.pixel_difference == 1
    assert set(proof.parts) == {"unet", *(training.model.facts.family.text_encoders if text else ())}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_base_in_16_bits_in_which_diffusers_rounds_the_factors_passes(
    dtype: str, tiny_base: Path, pictures: Path, tmp_path: Path
) -> None:
    training = tiny_training(
        tiny_base, pictures, tmp_path / "run", "text_encoder.learning_rate=0.01", f"train.precision={dtype}"
    )
    shake(training)
    modules = exported(training).modules
    path = tmp_path / "x.safetensors"
    export_adapter(
        path,
        exported(training),
        training.config,
        {},
        "sd1",
    )
    training.take_out()
    proof = verify(training.model, path, modules, "a cat")
    assert proof.problems == () and proof.modules == proof.read_by_diffusers
    doubled = {name: dataclasses.replace(module, alpha=module.alpha * 1.02) for name, module in modules.items()}
    (problem,) = verify(training.model, path, doubled, "a cat").problems
    assert "otherwise than it was trained (relative error 2.0e-02" in problem


def test_a_file_in_double_precision_is_verified_as_one_in_single(run: RunFolder, tiny_base: Path, tmp_path: Path) -> None:
    """Written by others; its numbers are read as float32."""
    assert run.result is not None
    wide = {key: tensor.double() for key, tensor in load_file(run.result).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    assert verify_file(tmp_path / "wide.safetensors", str(tiny_base), BaseOptions()).ok


Spoil = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def alpha_doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor * 2 if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}


def text_model_lost(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("lora_te_text_model_", "lora_te_"): tensor for key, tensor in tensors.items()}


def a_module_missing(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(iter(tensors)).partition(".")[0]
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(first + ".")}


def up_and_down_swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    other = {"lora_down": "lora_up", "lora_up": "lora_down"}
    return {".".join(other.get(piece, piece) for piece in key.split(".")): tensor for key, tensor in tensors.items()}


def a_module_more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    return tensors | {f"{name}.lora_down.weight": torch.ones(2, 64, 1, 1), f"{name}.lora_up.weight": torch.ones(64, 2, 1, 1)}


def one_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    spoilt = tensors[key].clone()
    spoilt.view(-1)[0] = float("nan")
    return {**tensors, key: spoilt}


WRONG: dict[str, tuple[Spoil, str]] = {
    "alpha doubled": (alpha_doubled, "otherwise than it was trained (relative error 1.0e+00"),
    "text_model lost": (text_model_lost, "12 names lack text_model"),
    "a module missing": (a_module_missing, "1 of 44 modules are not read by"),
    "up and down swapped": (up_and_down_swapped, ""),
    "one NaN": (one_nan, "NaN"),
    "a module more": (a_module_more, "1 modules in it were not trained"),
}


def spoil(path: Path, change: Spoil, target: Path, keep_metadata: bool) -> Path:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {key: tensor.contiguous() for key, tensor in change(load_file(path)).items()}
    save_file(tensors, target, metadata if keep_metadata else None)
    return target


@pytest.mark.parametrize("metadata", [True, False], ids=["with its metadata", "without"])
@pytest.mark.parametrize("name", WRONG)
def test_a_file_made_wrong_turns_red_in_its_run_folder(name: str, metadata: bool, run: RunFolder) -> None:
    change, words = WRONG[name]
    assert run.result is not None
    path = spoil(run.result, change, run.path / "wrong.safetensors", metadata)
    try:
        proof = verify_file(path, None, BaseOptions())
    finally:
        path.unlink()
    assert not proof.ok and any(words in problem for problem in proof.problems), proof.problems
    if name != "text_model lost":  # which leaves the tensors' bytes in their order
        assert any("hash" in problem for problem in proof.problems) == metadata


@pytest.mark.parametrize("name", WRONG)
def test_a_file_made_wrong_turns_red_elsewhere_by_its_hash(name: str, run: RunFolder, tiny_base: Path, tmp_path: Path) -> None:
    assert run.result is not None
    path = spoil(run.result, WRONG[name][0], tmp_path / "wrong.safetensors", True)
    assert impasto("inspect", path, "--verify", "--base", tiny_base) == 1


def test_a_sound_file_elsewhere_is_compared_between_the_readers(run: RunFolder, tiny_base: Path, tmp_path: Path) -> None:
    assert run.result is not None
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(run.result.read_bytes())
    proof = verify_file(copy, str(tiny_base), BaseOptions())
    assert proof.ok and proof.against == "what this program reads"
    assert impasto("inspect", copy, "--verify") == 2  # which base it is for is not known there


def test_a_run_whose_file_is_read_otherwise_fails(
    tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is made to double alpha: the run must end with an error, its file and proof kept."""
    from trainers import export

    def doubled(path: Path, modules: dict[str, ModuleWeights], *more: Any, **options: Any) -> Any:
        twice = {name: ModuleWeights(module.factors, module.alpha * 2) for name, module in modules.items()}
        return genuine(path, twice, *more, **options)

    genuine = export.write_adapter
    monkeypatch.setattr(export, "write_adapter", doubled)
    with pytest.raises(AdapterFileError, match="would not be read as it was trained"):
        full_run(tiny_base, pictures, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert run.result is not None and not json.loads(run.proof.read_text(encoding="utf-8"))["ok"]


def test_layers_that_were_left_at_zero_are_told(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    training = tiny_training(tiny_base, pictures, tmp_path / "run", "text_encoder.learning_rate=0.01")
    shake(training)
    with torch.no_grad():
        for name, factors in training.flat.views.items():
            if name.startswith("text_encoder"):
                factors["up"].zero_()
    modules = exported(training).modules
    path = tmp_path / "x.safetensors"
    export_adapter(
        path,
        exported(training),
        training.config,
        {},
        "sd1",
    )
    training.take_out()
    proof: Proof = verify(training.model, path, modules)
    assert proof.ok and proof.zero["text_encoder"] == proof.parts["text_encoder"] and proof.zero["unet"] == 0


def test_a_picture_that_the_memory_does_not_hold_is_no_fault_of_the_file(
    run: RunFolder, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers import read_back

    def too_large(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert run.result is not None
    monkeypatch.setattr(read_back, "_drawn_by", too_large)
    proof = verify_file(run.result, None, BaseOptions())
    assert proof.ok and proof.pixel_difference is None and proof.read_by_diffusers == proof.modules


def test_a_run_s_file_is_drawn_on_the_run_s_base(
    run: RunFolder, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.result is not None
    words = ("--prompt", "a cat", "--steps", 2, "--lora", run.result)
    assert impasto("generate", *words, "--output", tmp_path / "own.png") == 0
    assert f"Base: {tiny_base}" in capsys.readouterr().err
    assert impasto("generate", *words, "--base", tiny_base, "--output", tmp_path / "said.png") == 0
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "said.png").read_bytes()


def test_a_base_that_is_read_otherwise_than_in_training_is_told(
    tiny_base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = full_run(tiny_base, pictures, tmp_path / "run", "base.clip_skip=2", "base.prediction_type=v_prediction")
    words = ("--prompt", "a cat", "--steps", 1, "--lora", run.result, "--output", tmp_path / "x.png")
    assert impasto("generate", *words, "--base", tiny_base) == 0
    said = capsys.readouterr().err
    assert "with clip skip 2" in said and "predicts v_prediction" in said
    assert impasto("generate", *words) == 0
    assert "was trained with" not in capsys.readouterr().err


def test_a_file_in_peft_form_is_proven_and_its_readers_are_told(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    run, told = full_run(tiny_base, pictures, tmp_path / "run", "output.form=peft")
    assert json.loads(run.proof.read_text(encoding="utf-8"))["ok"]
    assert any("A1111" in event.message for event in told if event.type == "warning")
