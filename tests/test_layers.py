"""The size of an adapter from headers alone, against the adapter that is injected and the file that is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import impasto, result_of
from trainers.config import read_config
from trainers.families import recognise_base
from trainers.layers import adapter_size
from trainers.run_folder import RunFolder

CHOICES = [
    (),
    ("adapter.rank=3", 'adapter.targets=["attention", "feed_forward", "projections", "convolutions"]'),
    ('adapter.targets=["cross_attention"]', "text_encoder.learning_rate=0"),
    ("adapter.rank=4", "text_encoder.rank=2", 'text_encoder.targets=["attention", "mlp"]', "text_encoder.learning_rate=1e-4"),
]


@pytest.mark.parametrize("overrides", CHOICES, ids=["preset", "all", "cross", "text"])
def test_counts_what_is_injected(start, tiny_base: Path, overrides: tuple[str, ...]) -> None:
    training = start(*overrides)
    size = adapter_size(training.config, recognise_base(str(tiny_base)))
    assert size.parameters == training.flat.weights.numel()
    assert size.layers == len(training.plans)


def test_foresees_the_file(home: Path, tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    words = ("--base", tiny_base, "--steps", "1", "--set", "samples.every=0", "--set", "adapter.rank=8", "--force")
    native = ("--set", "adapter.type=restart", "--set", "adapter.rank=8", "--set", "output.kind=native")
    for name, dtype, more in (("half", "fp16", ()), ("full", "fp32", ()), ("sum", "fp16", native)):
        run = tmp_path / name
        assert impasto("train", pictures, "-o", run, *words, "--set", f"output.dtype={dtype}", *more) == 0
        size = adapter_size(read_config(RunFolder(run).config), recognise_base(str(tiny_base)))
        assert size.file_bytes == pytest.approx(result_of(run).stat().st_size, abs=4000)
