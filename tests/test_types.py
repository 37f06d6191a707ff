"""Whole runs of every adapter type: proven through diffusers, stopped and gone on with to the same bytes, drawn again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.command_line import TINY, impasto, read_events, result_of, tensor_bytes
from trainers.config import build_config
from trainers.presets import resolve
from trainers.run_folder import RunFolder

TYPES = {
    "dora": ("adapter.type=dora",),
    "loha": ("adapter.type=loha",),
    "lokr": ("adapter.type=lokr", "adapter.factor=2"),
    "additive": ("adapter.type=additive",),
    "full": ("adapter.type=full",),
    "random_projection": ("adapter.type=random_projection", "adapter.every=2"),
    "restart": ("adapter.type=restart", "adapter.every=2", "adapter.warmup=1"),
    "symmetric": ("adapter.init=symmetric",),
    "pissa": ("adapter.init=pissa",),
    "olora": ("adapter.init=olora",),
    "grow": ("adapter.rank_schedule=grow", "adapter.grow_from=1", "adapter.grow_every=1"),
}
every_type = pytest.mark.parametrize("settings", TYPES.values(), ids=TYPES.keys())


def words_of(settings: tuple[str, ...], *more: str) -> list[str]:
    return [word for setting in (*settings, "optimizer.learning_rate=1e-2", *more) for word in ("--set", setting)]


@pytest.fixture
def stop_after_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def asked(run: RunFolder) -> str | None:
        done = run.events.exists() and any(event["type"] == "step" and event["step"] == 2 for event in read_events(run.path))
        return "stop" if done else None

    monkeypatch.setattr(RunFolder, "stop_asked", asked)
    return monkeypatch


@every_type
def test_a_stopped_run_goes_on_to_the_bytes_and_the_proof_of_an_unbroken_one(
    settings: tuple[str, ...], pictures: Path, tiny_base: Path, tmp_path: Path, stop_after_two: pytest.MonkeyPatch
) -> None:
    words: list[Any] = ["train", pictures, "--base", tiny_base, *TINY, "--steps", 4, *words_of(settings)]
    assert impasto(*words, "-o", tmp_path / "run") == 3
    stop_after_two.undo()
    assert impasto("resume", tmp_path / "run") == 0
    assert impasto(*words, "--set", "output.verify=true", "-o", tmp_path / "whole") == 0
    broken, whole = result_of(tmp_path / "run"), result_of(tmp_path / "whole")
    assert tensor_bytes(broken) == tensor_bytes(whole)
    proof = json.loads(RunFolder(tmp_path / "whole").proof.read_text(encoding="utf-8"))
    assert proof["ok"] and proof["read_by_diffusers"] == proof["modules"] > 20 and not any(proof["zero"].values())
    assert proof["picture_error"] < 1e-3  # of the LoRA's effect: the two programs draw the same
    with safe_open(whole, "pt") as file:
        keys = list(file.keys())
        assert all(key.endswith(("lora_down.weight", "lora_up.weight", "alpha")) for key in keys)
        assert file.metadata()["ss_network_module"] == "networks.lora"


@pytest.mark.parametrize("name", ["dora", "loha", "lokr", "random_projection", "restart"])
def test_in_its_own_form_the_file_is_read_back_as_that(name: str, pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    more = words_of(TYPES[name], "output.kind=native", "output.verify=true")
    assert impasto("train", pictures, "--base", tiny_base, *TINY, "--steps", 3, *more, "-o", tmp_path / "run") == 0
    with safe_open(result_of(tmp_path / "run"), "pt") as file:
        keys, metadata = " ".join(file.keys()), file.metadata()
    assert {"dora": "dora_scale", "loha": "hada_w1_a", "lokr": "lokr_w1"}.get(name, ".diff") in keys
    proof = json.loads(RunFolder(tmp_path / "run").proof.read_text(encoding="utf-8"))
    assert proof["ok"] and proof["read_here"] == proof["modules"] > 20 and 0 < proof["worst_error"] < 1e-3
    assert proof["read_by_diffusers"] == 0
    assert "diffusers does not read this form" in read_events(tmp_path / "run")[-1]["proof"]
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert impasto("inspect", result_of(tmp_path / "run")) == 0


def test_another_type_keeps_the_rank_of_the_preset_and_refuses_what_it_has_not() -> None:
    config = resolve("pocket", {}, ["adapter.type=dora"])
    assert config.adapter.type == "dora" and config.adapter.rank == resolve("pocket", {}).adapter.rank
    with pytest.raises(Exception, match=r"adapter\.factor"):
        resolve("pocket", {}, ["adapter.factor=4"])
    with pytest.raises(Exception, match="start_from"):
        build_config({"adapter": {"type": "loha", "start_from": "old.safetensors"}})
    with pytest.raises(Exception, match="start_from"):
        build_config({"adapter": {"init": "pissa", "start_from": "old.safetensors"}})
