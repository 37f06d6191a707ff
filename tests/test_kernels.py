"""Which kernels a base is computed with: measured once, kept, and taken up again by whatever goes on with a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import TINY, impasto
from tests.tiny_runs import update_from
from trainers.config import read_config
from trainers.kernels import Kernels, Shapes, choose_kernels, measure_kernels, shapes_of
from trainers.run_folder import RunFolder
from trainers.setup import set_up
from trainers.training_state import load_state

SHAPES = Shapes(((64, 32, 4), (16, 64, 4)), (64, 8))
CPU = torch.device("cpu")


def test_the_choice_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[torch.dtype] = []

    def measure(shapes: Shapes, dtype: torch.dtype) -> Kernels:
        counted.append(dtype)
        return Kernels(blocked=len(counted) == 1, products=len(counted))

    monkeypatch.setattr("trainers.kernels.measure_kernels", measure)
    first = choose_kernels(SHAPES, torch.float32, CPU, tmp_path)
    assert first == choose_kernels(SHAPES, torch.float32, CPU, tmp_path) == Kernels(blocked=True, products=1)
    assert choose_kernels(SHAPES, torch.bfloat16, CPU, tmp_path) != first, "another format has its own"
    assert len(counted) == 2
    (kept,) = [path for path in tmp_path.iterdir() if json.loads(path.read_text())["chosen"]["blocked"]]
    kept.write_text("{")
    choose_kernels(SHAPES, torch.float32, CPU, tmp_path)
    assert len(counted) == 3 and json.loads(kept.read_text())["chosen"]["products"] == 3, "a damaged one is measured again"
    assert choose_kernels(SHAPES, torch.float32, torch.device("cuda"), tmp_path) == Kernels()


def test_measuring_finds_some_choice_for_each_format() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = measure_kernels(SHAPES, dtype)
        assert found.products in (0, 16 * 16, 64 * 64)
        assert not found.matrices


def test_shapes_are_those_of_the_levels_with_attention() -> None:
    config = {
        "block_out_channels": [320, 640, 1280],
        "attention_head_dim": [5, 10, 20],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    }
    assert shapes_of(config, 64) == Shapes(((32 * 32, 640, 10), (16 * 16, 1280, 20)), (1280, 16))
    assert shapes_of(config | {"attention_head_dim": 8}, 4).levels[-1] == (1, 1280, 8)


def test_a_resumed_run_computes_with_the_kernels_that_it_began_with(
    tiny_base: Path, pictures: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.setup.FOR_SMALL", Kernels(blocked=True, matrices=True, products=1 << 20))
    words = ("train", pictures, "--base", tiny_base, *TINY, "--steps", "2", "--output", tmp_path / "run")
    assert impasto(*words) == 0
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr("trainers.setup.FOR_SMALL", Kernels())
    before = load_state(run)
    assert before is not None
    training = set_up(read_config(run.config), run, lambda event: None, before=before)
    assert training.device.fast == Kernels(blocked=True, matrices=True, products=1 << 20)
    manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
    assert manifest["kernels"]["blocked"] is True and manifest["kernels"]["threads"] == torch.get_num_threads()


def test_the_fast_path_learns_what_the_plain_one_learns(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("text_encoder.learning_rate=1e-3", "optimizer.learning_rate=1e-3", "train.batch_size=2", "adapter.rank=4")
    found = {}
    for kernels in (Kernels(blocked=True, matrices=True, products=1 << 20), Kernels(), None):
        with monkeypatch.context() as patch:
            patch.setattr("trainers.setup.FOR_SMALL", kernels or Kernels())
            if kernels is None:  # diffusers' own modules, and the adapter beside them as it is written in the paper
                patch.setattr("trainers.setup.make_fast", lambda parts, kernels: [])
                patch.delattr("trainers.adapters.lora.Lora.joined")
            found[kernels] = update_from(start(*settings), 60)
    plain = found.pop(None)
    assert float(plain.norm()) > 0
    for weights in found.values():
        assert float((weights - plain).norm() / plain.norm()) < 1e-3


def test_fp32_that_is_asked_for_keeps_its_digits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers.device import choose_device

    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    try:
        for precision, exact in (("fp32", True), ("auto", False), ("bf16", False)):
            choose_device(precision, 1 << 30)
            assert torch.backends.cudnn.allow_tf32 is not exact
            assert (torch.get_float32_matmul_precision() == "highest") is exact
        before = {"matmul": "highest", "dtype": "bf16", "threads": 1, "processes": 1}
        choose_device("auto", 1 << 30, before)
        assert not torch.backends.cudnn.allow_tf32, "a resumed run computes as it did"
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions
