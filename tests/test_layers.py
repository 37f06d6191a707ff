"""The size of an adapter from headers alone, against the adapter that is injected and the file that is written."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import impasto, result_of
from tests.tiny_runs import exported, shake
from trainers.adapters import AdapterConfig
from trainers.config import read_config
from trainers.container import read_header
from trainers.export import export_adapter
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


TYPES = [one.model_fields["type"].default for one in typing.get_args(typing.get_args(AdapterConfig)[0])]


OTHERS = [("lora", "adapter.init=symmetric"), ("dora", "output.dtype=fp32"), ("lokr", "adapter.rank=2", "text_encoder.rank=1")]


@pytest.mark.parametrize("settings", [*((kind,) for kind in TYPES), *OTHERS], ids="-".join)
def test_the_numbers_of_a_native_file_are_foreseen_to_the_byte(
    start: Any, tiny_base: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    kind, *more = settings
    words = ("dataset.trigger=zwx", "output.kind=native", "adapter.rank=10", "text_encoder.rank=3")
    training = start(f"adapter.type={kind}", *words, 'adapter.targets=["attention", "convolutions"]', *more)
    assert training.config.adapter.type == kind
    shake(training)
    made = exported(training)
    export_adapter(tmp_path / "own.safetensors", made, training.config, {"ss_network_dim": "10", "ss_network_alpha": "10.0"})
    size = adapter_size(training.config, recognise_base(str(tiny_base)))
    with (tmp_path / "own.safetensors").open("rb") as handle:
        header = read_header(handle, tmp_path / "own.safetensors")
    assert size.weight_bytes == header.size - header.data_start
    assert size.weight_bytes < size.file_bytes == pytest.approx(header.size, abs=6000 + 0.2 * header.data_start)
    told = {name: header.metadata.get(name) for name in ("ss_network_dim", "ss_network_alpha")}
    if not any(module.rank for module in made.modules.values()):  # full differences: 0 is nothing to divide by
        assert told == dict.fromkeys(told)
    else:
        assert None not in told.values() and "0" not in told.values()
