"""Several processes train as one: the result differs by rounding only, and one of them writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.command_line import TINY, environment, impasto, read_events, result_of

# Three pictures a step: the processes' shares differ. Prior pictures are drawn by one and read by both.
SETTINGS = (
    *(*TINY, "--steps", "4", "--set", "train.accumulation=2", "--set", "output.dtype=fp32"),
    *("--set", 'prior.prompts=["a lamp"]', "--set", "prior.steps=2", "--set", "samples.every=2"),
)


def test_two_processes_give_what_one_gives_to_rounding(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    words = ["train", str(pictures), "--base", str(tiny_base), *map(str, SETTINGS)]
    assert impasto(*words, "--output", tmp_path / "one") == 0
    launch = ["torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    command = [sys.executable, "-P", "-m", *launch, "-m", "trainers", *words, "--output", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment(), capture_output=True, encoding="utf-8", timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(result_of(tmp_path / name)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    assert max(tensor.abs().max().item() for name, tensor in two.items() if "lora_up" in name) > 1e-5

    told = read_events(tmp_path / "two")
    assert [event["step"] for event in told if event["type"] == "step"] == [1, 2, 3, 4]
    losses = [[event["loss"] for event in read_events(tmp_path / name) if event["type"] == "step"] for name in ("one", "two")]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
