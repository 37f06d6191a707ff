"""The main job, end to end: a folder of pictures -> a run folder -> a LoRA that diffusers loads -> a picture that changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from tests.command_line import contents, impasto, read_events, result_of, tensor_bytes
from tests.conftest import make_pictures

PROMPT = "a red apple, test style"
SETTINGS = (
    *("--steps", 6, "--seed", 3),
    *("--set", "adapter.rank=4", "--set", "adapter.alpha=2", "--set", "optimizer.learning_rate=0.01"),
    *("--set", "adapter.targets=['attention', 'feed_forward', 'convolutions']"),
    *("--set", "train.batch_size=2", "--set", "samples.every=3", "--set", "samples.steps=2"),
    *("--set", "checkpoints.every=2", "--set", "checkpoints.keep=2"),
)


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The folder of pictures and the finished run on it."""
    place = tmp_path_factory.mktemp("journey")
    pictures = make_pictures(place / "pictures")
    before = contents(pictures)
    assert impasto("train", pictures, "--output", place / "run", "--base", tiny_base, *SETTINGS) == 0
    assert contents(pictures) == before
    yield pictures, place / "run"


@pytest.fixture(scope="module")
def run(folders: tuple[Path, Path]) -> Path:
    return folders[1]


@pytest.fixture(scope="module")
def drawn(run: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same prompt drawn by the base alone (base.png) and at strengths 0 and 1."""
    folder = tmp_path_factory.mktemp("drawn")
    common = ("--base", tiny_base, "--prompt", PROMPT, "--steps", 3, "--seed", 5)
    assert impasto("generate", *common, "--output", folder / "base.png") == 0
    assert impasto("generate", *common, "--lora", result_of(run), "--strengths", "0,1", "--output", f"{folder}/") == 0
    return folder


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return numpy.asarray(image.convert("RGB")).astype(int)


def of_type(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["type"] == kind]


def test_a_run_folder_holds_what_was_promised_and_nothing_else(run: Path) -> None:
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    promised = {"config.toml", "events.jsonl", "trainer.log", "samples", "checkpoints", "state", "manifest.json"}
    promised.add("verification.json")
    assert names == promised | {result_of(run).name}
    assert result_of(run).name == "pictures-tiny-r4.safetensors"


def test_only_the_newest_checkpoints_are_kept(run: Path) -> None:
    kept = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert kept == ["pictures-tiny-r4-00000004.safetensors", "pictures-tiny-r4-00000006.safetensors"]
    assert [event["step"] for event in of_type(run, "checkpoint")] == [2, 4, 6]


def test_samples_are_drawn_at_the_start_at_their_steps_and_at_the_end(run: Path) -> None:
    samples = of_type(run, "sample")
    assert [sample["step"] for sample in samples] == [0, 0, 3, 3, 6, 6]
    assert {sample["path"] for sample in samples} == {f"samples/{path.name}" for path in (run / "samples").iterdir()}
    assert all(pixels(run / sample["path"]).shape == (64, 64, 3) for sample in samples)
    assert {(sample["seed"], sample["strength"]) for sample in samples} == {(0, 1.0)}


def test_every_step_tells_what_was_promised(run: Path) -> None:
    steps = of_type(run, "step")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        assert step["loss"] > 0 and step["gradient_norm"] > 0 and step["memory"] > 10_000_000
        assert step["seconds_per_step"] > 0 and step["seconds_left"] >= 0 and step["steps"] == 6
        assert set(step["learning_rates"]) == {"unet", "text_encoder"}
    assert steps[0]["learning_rates"]["unet"] > steps[-1]["learning_rates"]["unet"] > 0


def test_the_held_out_loss_is_told_when_it_is_due(run: Path) -> None:
    assert [step["step"] for step in of_type(run, "step") if step["held_out_loss"]] == [3, 6]
    assert of_type(run, "started")[0]["held_out"] == 1


def test_events_begin_with_the_stages_and_end_with_finished(run: Path) -> None:
    told = read_events(run)
    stages = [event["name"] for event in told if event["type"] == "stage"]
    # Pictures are prepared where no run before has done so.
    assert [name for name in stages if name != "cache"] == ["scan", "load", "train", "export", "verify"]
    assert told[-1]["type"] == "finished" and told[-1]["path"] == result_of(run).name
    assert told[-1]["proof"].startswith("Read back: diffusers loads all ")
    assert [event["time"] for event in told] == sorted(event["time"] for event in told)


def test_the_last_checkpoint_is_the_result(run: Path) -> None:
    assert (run / "checkpoints" / "pictures-tiny-r4-00000006.safetensors").read_bytes() == result_of(run).read_bytes()


def test_the_log_tells_the_same_story(run: Path) -> None:
    log = (run / "trainer.log").read_text(encoding="utf-8")
    assert '"type": "finished"' in log


def test_diffusers_loads_every_module_of_the_file(run: Path, tiny_base: Path) -> None:
    import torch
    from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline
    from safetensors.torch import load_file

    load: Any = StableDiffusionPipeline.from_pretrained  # its type hints are too few to check against
    pipeline = load(tiny_base, safety_checker=None, local_files_only=True)
    pipeline.load_lora_weights(result_of(run).parent, weight_name=result_of(run).name)
    tensors = load_file(result_of(run))
    stems = {key.rpartition(".alpha")[0] for key in tensors if key.endswith(".alpha")}
    loaded = {
        f"{part}_{'text_model_' if part == 'lora_te' else ''}{name}".replace(".", "_"): module
        for part, model in (("lora_unet", pipeline.unet), ("lora_te", pipeline.text_encoder))
        for name, module in ((name.removeprefix("text_model."), module) for name, module in model.named_modules())
        if hasattr(module, "lora_A")
    }
    assert set(loaded) == stems
    assert any(stem.startswith("lora_te") for stem in stems) and any("resnets" in stem for stem in stems)
    for stem, module in loaded.items():
        (adapter,) = module.lora_A
        theirs = module.get_delta_weight(adapter).double()
        up, down = (tensors[f"{stem}.lora_{side}.weight"].double() for side in ("up", "down"))
        ours = float(tensors[f"{stem}.alpha"]) / down.shape[0] * (up.flatten(1) @ down.flatten(1)).view(theirs.shape)
        assert float(ours.abs().max()) > 0, stem
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-9), stem


def test_strength_0_is_the_base_bit_for_bit(drawn: Path) -> None:
    assert (pixels(drawn / "000_s0.00.png") == pixels(drawn / "base.png")).all()


def test_strength_1_changes_the_picture(drawn: Path) -> None:
    assert abs(pixels(drawn / "000_s1.00.png") - pixels(drawn / "base.png")).max() > 8


def test_pictures_in_a_folder_are_named_by_prompt_and_strength(drawn: Path) -> None:
    assert sorted(path.name for path in drawn.iterdir()) == ["000_s0.00.png", "000_s1.00.png", "base.png"]


def test_strengths_multiply_each_loras_own(drawn: Path, run: Path, tiny_base: Path, tmp_path: Path) -> None:
    common = ("--base", tiny_base, "--prompt", PROMPT, "--steps", 3, "--seed", 5)
    assert impasto("generate", *common, "--lora", f"{result_of(run)}:0.5", "--strengths", 2, "-o", tmp_path / "a.png") == 0
    assert (pixels(tmp_path / "a.png") == pixels(drawn / "000_s1.00.png")).all()


def test_a_grid_shows_prompts_by_strengths_with_labels(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    side = 160  # from here on a grid shows pictures as they are, without enlarging them
    words = ("--prompt", PROMPT, "--prompt", "a green leaf", "--strengths", "0,1", "--steps", 1, "--size", f"{side}x{side}")
    common = ("generate", "--base", tiny_base, "--lora", result_of(run), *words)
    assert impasto(*common, "--output", tmp_path / "strip.png") == 0
    assert impasto(*common, "--output", f"{tmp_path}/single/") == 0
    grid = pixels(tmp_path / "strip.png")
    at = []
    for path in sorted((tmp_path / "single").iterdir()):
        picture = pixels(path)
        first = (grid[: 1 - side, : 1 - side] == picture[0, 0]).all(2)
        last = (grid[side - 1 :, side - 1 :] == picture[-1, -1]).all(2)
        for y, x in numpy.argwhere(first & last):
            if (grid[y : y + side, x : x + side] == picture).all():
                at.append((y, x))
                grid[y : y + side, x : x + side] = 255
    assert len(at) == 4 and at[0][0] == at[1][0] < at[2][0] == at[3][0] and at[0][1] == at[2][1] < at[1][1] == at[3][1]
    assert (grid < 128).any(), "the labels are left"


def test_config_toml_is_a_preset_that_trains_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pictures, run = folders
    assert impasto("train", pictures, "--output", tmp_path / "again", "--preset", run / "config.toml") == 0
    assert (tmp_path / "again" / "config.toml").read_bytes() == (run / "config.toml").read_bytes()
    assert tensor_bytes(result_of(tmp_path / "again")) == tensor_bytes(result_of(run))


def test_inspect_names_rank_alpha_parts_and_no_problem(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert impasto("inspect", result_of(run)) == 0
    told = capsys.readouterr().out
    assert re.search(r"rank +4$", told, re.MULTILINE) and re.search(r"alpha +2$", told, re.MULTILINE)
    assert "unet" in told and "text_encoder" in told and "error" not in told
    assert "zero        " not in told
