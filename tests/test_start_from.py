"""Training on from a LoRA file: the same change at step 0, a resume without the file, and refusals before weights load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import TINY, impasto, read_events, result_of, tensor_bytes
from tests.formats.examples import random_weights
from tests.tiny_runs import tiny_config, update_from
from tests.tools.mergeable import PLAIN, save_adapter
from trainers.adapters.lora import LORA
from trainers.config import read_config
from trainers.errors import AdapterFileError, ChangedError, Problem, SettingError
from trainers.export import _session
from trainers.families import recognise_base
from trainers.formats import ModuleWeights, read_without_base, write_adapter
from trainers.launch import plan_run
from trainers.run_folder import RunFolder
from trainers.setup import Training
from trainers.start_from import check_start

LEARNT = {"attn1.to_q": "lora", "attn2.to_k": "lora", "self_attn.v_proj": "lora"}
TEXT = "text_encoder.learning_rate=1e-4"


@pytest.fixture(scope="module")
def lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 3, alpha 7, in half precision, on attention and on what a run does not train by itself."""
    path = tmp_path_factory.mktemp("lora") / "old.safetensors"
    return save_adapter(path, tiny_base, LEARNT | {"mlp.fc1": "lora"}, rank=3, alpha=7.0, dtype="fp16")


def deltas(training: Training) -> dict[str, torch.Tensor]:
    """What each layer's adapter changes now."""
    factors = training.flat.split(training.flat.weights)
    return {plan.name: LORA.delta(factors[plan.name], plan.scale) for plan in training.plans}


def problems(base: Path, pictures: Path, file: Path, *overrides: str) -> list[Problem]:
    config = tiny_config(base, pictures, "adapter.rank=3", TEXT, f"adapter.start_from={file}", *overrides)
    return check_start(config, recognise_base(str(base)))


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_step_0_changes_what_the_file_changes(start: Any, lora: Path, scaling: str) -> None:
    settings = ("adapter.rank=5", "adapter.alpha=2", f"adapter.scaling={scaling}", TEXT)
    own, fresh = start(*settings, f"adapter.start_from={lora}"), start(*settings)
    wanted = {name: weights.delta() for name, weights in read_without_base(lora, "sd1").modules.items()}
    made = deltas(own)
    assert wanted.keys() <= made.keys() and len(made) > len(wanted)
    for name, delta in made.items():
        expected = wanted.get(name, torch.zeros_like(delta))
        assert float((delta - expected).norm()) <= 1e-6 * float(expected.norm()), name
    rows, drawn = own.flat.split(own.flat.weights), fresh.flat.split(fresh.flat.weights)
    for name in made:
        known = 3 if name in wanted else 0
        assert torch.equal(rows[name]["down"][known:], drawn[name]["down"][known:]), "the rest is drawn as usual"
        assert not rows[name]["up"][:, known:].any()


def test_convolutions_and_projections_are_gone_on_with(start: Any, tiny_base: Path, tmp_path: Path) -> None:
    path = save_adapter(tmp_path / "a.safetensors", tiny_base, {"conv1": "lora", "proj_in": "lora"}, rank=2)
    training = start('adapter.targets=["convolutions", "projections"]', f"adapter.start_from={path}")
    wanted = {name: weights.delta() for name, weights in read_without_base(path, "sd1").modules.items()}
    made = deltas(training)
    assert {delta.shape[2:] for delta in wanted.values()} == {(3, 3), (1, 1)}
    for name, delta in wanted.items():
        assert float((made[name] - delta).norm()) <= 1e-6 * float(delta.norm()), name


def test_rows_have_the_size_of_new_ones_and_dead_ones_are_drawn_anew() -> None:
    """A file may have balanced its factors, and a rank without numbers would never learn."""
    given = random_weights((8, 16), 3, 3.0, seed=1)
    given.factors["down"][1], given.factors["up"][:, 1] = 0.0, 0.0
    given.factors["down"][2] *= 2.0**-9
    factors = {"down": torch.empty(4, 16), "up": torch.empty(8, 4)}
    LORA.initialise(factors, torch.Generator().manual_seed(0))
    drawn = factors["down"].clone()
    LORA.continue_from(factors, given.factors, 1.0)
    assert torch.equal(LORA.delta(factors, 1.0), LORA.delta(given.factors, 1.0)), "powers of two lose nothing"
    assert torch.equal(factors["down"][2:], drawn[2:]) and not factors["up"][:, 2:].any()
    assert all(0.7 < float(row.norm()) < 1.42 for row in factors["down"][:2])


def test_training_moves_on_from_there(start: Any, lora: Path) -> None:
    training = start("adapter.rank=3", TEXT, f"adapter.start_from={lora}")
    before = training.flat.weights.clone()
    assert not torch.equal(update_from(training, 2), before)
    assert torch.isfinite(training.flat.weights).all()


def test_a_run_goes_on_bit_for_bit_with_the_file_gone(
    pictures: Path, tiny_base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "my private place" / "old.safetensors"
    copy.parent.mkdir()
    copy.write_bytes(lora.read_bytes())
    monkeypatch.chdir(copy.parent)
    words = ("train", pictures, "--base", tiny_base, *TINY, "--steps", 3, "--set", "adapter.start_from=old.safetensors", "-o")
    assert impasto(*words, tmp_path / "whole") == 0
    monkeypatch.setattr("trainers.train.hold_pictures", _stop_at_once)
    with pytest.raises(Killed):
        impasto(*words, tmp_path / "run")  # killed before its first step
    monkeypatch.undo()
    assert read_config(tmp_path / "run" / "config.toml").adapter.start_from == str(copy)
    digest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["start_from"]
    copy.unlink()
    assert impasto("resume", tmp_path / "run") == 0
    assert tensor_bytes(result_of(tmp_path / "run")) == tensor_bytes(result_of(tmp_path / "whole"))
    assert b"my private place" not in result_of(tmp_path / "run").read_bytes()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["start_from"] == digest and "my private place" not in json.dumps(manifest)
    told = [event.get("message", "") for event in read_events(tmp_path / "whole")]
    assert any("12 layers start from old.safetensors, 32 from nothing" in message for message in told)


class Killed(BaseException):
    """Ends a run as a kill does: nothing of ours catches it."""


def _stop_at_once(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize(
    "setting", ["adapter.start_from={}/old.safetensors", "prior.folder={}/usual", "dataset.edits={}/edits.json"]
)
def test_where_a_file_lies_does_not_name_the_session(setting: str, tiny_base: Path, pictures: Path) -> None:
    one, other = (tiny_config(tiny_base, pictures, setting.format(place)) for place in ("here", "there"))
    assert _session(one) == _session(other) != _session(tiny_config(tiny_base, pictures, "adapter.rank=3"))


def test_another_file_before_the_first_state_is_a_change(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.check_manifest({"start_from": {"LoRA": "a"}, "images": {}})
    with pytest.raises(ChangedError, match="the LoRA that it starts from has changed"):
        run.check_manifest({"start_from": {"LoRA": "b"}, "images": {}})
    assert run.check_manifest({"images": {}}) == []
    assert run.check_manifest({"images": {"a": "b"}}, force=True) == ["the picture a is new"]
    assert json.loads(run.manifest.read_text(encoding="utf-8"))["start_from"] == {"LoRA": "a"}


def test_what_would_be_lost_is_told_with_its_count(tiny_base: Path, pictures: Path, lora: Path) -> None:
    assert [problem.severity for problem in problems(tiny_base, pictures, lora)] == ["note"]
    found = problems(tiny_base, pictures, lora, 'text_encoder.targets=["attention"]')
    assert [problem.severity for problem in found] == ["note", "warning"]
    assert "2 of 12 modules of old.safetensors are not trained" in found[1].what
    assert "mlp_fc1" in found[1].what and "text_encoder" in found[1].hint


def test_a_higher_rank_is_refused_with_both_remedies(tiny_base: Path, pictures: Path, lora: Path) -> None:
    (found,) = problems(tiny_base, pictures, lora, "adapter.rank=2")
    assert found.severity == "error" and "rank 3" in found.what and "rank 2" in found.what
    assert "adapter.rank=3" in found.hint and "impasto merge old.safetensors --rank 2" in found.hint
    (found,) = problems(tiny_base, pictures, lora, "text_encoder.rank=1")
    assert "text_encoder.rank=3" in found.hint


def test_what_cannot_be_trained_on_is_refused_in_words(
    tiny_base: Path, tiny_sdxl_base: Path, pictures: Path, lora: Path, tmp_path: Path
) -> None:
    loha = save_adapter(tmp_path / "loha.safetensors", tiny_base, {"attn1.to_q": "loha"}, rank=2)
    xl = save_adapter(tmp_path / "xl.safetensors", tiny_sdxl_base, PLAIN, rank=2)
    aside = save_adapter(tmp_path / "aside.safetensors", tiny_base, {"proj_in": "lora"}, rank=2)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    write_adapter(tmp_path / "wide.safetensors", {name: random_weights((32, 48), 2, 2.0, 0)}, {}, "fp32")
    (tmp_path / "torn.safetensors").write_bytes(lora.read_bytes()[:-5])
    for file, words in {
        loha: "holds loha .* only a LoRA .*--plain-lora",
        xl: "made for Stable Diffusion XL",
        aside: "None of the 4 modules of aside.safetensors is one that this run trains .*adapter.targets",
        tmp_path / "wide.safetensors": "the file's layer is 32 x 48, the base model's 32 x 32",
        tmp_path / "torn.safetensors": "cut short",
        tmp_path / "gone.safetensors": "no such file",
    }.items():
        (found,) = problems(tiny_base, pictures, file)
        assert found.severity == "error"
        with pytest.raises(SettingError, match=words):
            plan_run(None, {"base": {"model": str(tiny_base)}, "dataset": {"images": str(pictures)}},
                     [f"adapter.start_from={file}"], force=True)  # fmt: skip


def test_numbers_that_are_not_finite_are_found_before_the_base_is_read(
    start: Any, tiny_base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = read_without_base(lora, "sd1").modules
    name = next(name for name in modules if name.endswith("to_q"))
    path = tmp_path / "nan.safetensors"
    write_adapter(path, {name: ModuleWeights(modules[name].factors, 3.0)}, {}, "fp32")
    data = bytearray(path.read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    monkeypatch.setattr("trainers.setup.load_family", lambda *_: pytest.fail("the base was read"))
    with pytest.raises(AdapterFileError, match="NaN"):
        start("adapter.rank=3", f"adapter.start_from={path}")
