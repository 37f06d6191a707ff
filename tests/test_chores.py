"""What the render worker does beside drawing: a LoRA weighed by block, a blend exported, both told and refused in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.app_client import make_run
from tests.asked_worker import kinds, run, wait_for
from tests.tiny_lora import TEXT, UNET, UNET_OUT, save_lora
from tests.tools.mergeable import MIXED, save_adapter
from trainers.adapters.inject import find_layers
from trainers.adapters.plan import block_of
from trainers.families import load_family, recognise_base
from trainers.formats import read_adapter, read_without_base
from trainers.warm import Warm
from trainers.worker import serve


def weigh(base: Path, lora: Path, folder: Path, number: int = 1) -> dict[str, Any]:
    return {"do": "weigh", "id": number, "base": str(base), "path": str(lora), "folder": str(folder)}


def answer(events: list[dict[str, Any]]) -> Any:
    (found,) = [event["answer"] for event in events if event["event"] == "answer"]
    return found


def test_a_lora_s_weight_by_block_is_the_norm_of_its_update_of_any_type(tiny_base: Path, tmp_path: Path) -> None:
    file = save_adapter(tmp_path / "mixed.safetensors", tiny_base, MIXED)
    told = answer(run(weigh(tiny_base, file, tmp_path / "out")))
    base = load_family(recognise_base(str(tiny_base)), torch.float32, torch.device("cpu"))
    layers: dict[str, Any] = find_layers(base.parts())
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    modules = read_adapter(file, shapes, shapes).modules
    for block in {block_of(name) for name in modules}:
        mine = [name for name in modules if block_of(name) == block]
        (found,) = [one for one in told["blocks"] if one["block"] == block]
        update = torch.cat([modules[name].delta(layers[name].weight.detach()).flatten() for name in mine]).norm()
        frozen = torch.cat([layers[name].weight.detach().double().flatten() for name in mine]).norm()
        assert found["layers"] == len(mine)
        assert (found["norm"], found["base"]) == (pytest.approx(float(update)), pytest.approx(float(frozen)))
    assert told["blocks"][0]["block"] == "text" and len(told["blocks"]) > 3


def test_what_was_weighed_is_not_weighed_again_until_the_file_changes(tiny_base: Path, tmp_path: Path) -> None:
    file, warm = save_lora(tmp_path / "a.safetensors", UNET), Warm()
    first = run(weigh(tiny_base, file, tmp_path / "out"), warm=warm)
    again = run(weigh(tiny_base, file, tmp_path / "out"))  # with nothing warm
    assert kinds(first) == ["loading", "answer", "done"] and kinds(again) == ["answer", "done"]
    assert answer(first) == answer(again)
    save_lora(file, UNET, UNET_OUT, TEXT)
    assert {one["block"] for one in answer(run(weigh(tiny_base, file, tmp_path / "out"), warm=warm))["blocks"]} == {
        "text",
        "down_0",
    }


def test_a_blend_is_exported_as_one_file(tmp_path: Path) -> None:
    files = [save_lora(tmp_path / "a.safetensors", UNET), save_lora(tmp_path / "b.safetensors", UNET, TEXT, seed=1)]
    uses = [{"path": str(file), "unet": strength, "text": 0.0} for file, strength in zip(files, (0.5, -0.25), strict=True)]
    output = tmp_path / "loras" / "sum.safetensors"
    request = {"do": "export", "id": 1, "loras": uses, "output": str(output), "family": "sd1", "folder": ""}
    told = answer(run(request))
    assert told["path"] == str(output) and "out of 2 files" in told["told"]
    made = read_without_base(output, "sd1").modules
    parts = [read_without_base(file, "sd1").modules[UNET].delta() for file in files]
    assert made.keys() == {UNET}
    torch.testing.assert_close(made[UNET].delta(), 0.5 * parts[0] - 0.25 * parts[1], rtol=1e-6, atol=1e-6)
    assert told["remarks"] == []
    last = run(request)[-1]
    assert last["event"] == "failed" and "already" in last["what"]
    assert run({**request, "loras": []})[-1]["event"] == "failed"


def test_an_export_says_which_embedding_its_lora_needs(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "2026-pivotal", [])
    for inner in (folder.state, folder.embeddings, folder.checkpoints):
        inner.mkdir()
    (folder.embeddings / "zwx.safetensors").write_bytes(b"")
    uses = [{"path": str(save_lora(folder.checkpoints / "zwx-00000010.safetensors", UNET)), "unet": 1.0, "text": 1.0}]
    output = tmp_path / "loras" / "alone.safetensors"
    request = {"do": "export", "id": 1, "loras": uses, "output": str(output), "family": "sd1", "folder": ""}
    (remark,) = answer(run(request))["remarks"]
    assert "needs the embedding zwx of the run 2026-pivotal" in remark


def test_a_chore_is_done_although_a_picture_replaces_those_before_it(tiny_base: Path, tmp_path: Path) -> None:
    file = save_lora(tmp_path / "a.safetensors", UNET)
    how = {"prompt": "a", "seed": 1, "width": 32, "height": 32, "strengths": [0.0], "folder": str(tmp_path), "replaces": True}
    told: list[dict[str, Any]] = []

    def lines() -> Iterator[bytes]:
        yield json.dumps({"do": "render", "id": 1, "base": str(tiny_base), "steps": 500, **how}).encode()
        wait_for(told, 1, "step")
        yield json.dumps(weigh(tiny_base, file, tmp_path, 2)).encode()
        yield json.dumps({"do": "render", "id": 3, "base": str(tiny_base), "steps": 1, **how}).encode()
        wait_for(told, 3, "done")

    serve(lines(), told.append, Warm())
    assert (kinds(told, 1)[-1], kinds(told, 2)[-2:], kinds(told, 3)[-1]) == ("cancelled", ["answer", "done"], "done")
