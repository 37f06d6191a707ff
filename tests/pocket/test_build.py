"""The whole build on its smallest recipe, from the packages to the contact sheets: what it makes is a base that loads."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from assets.pocket.build import evaluate, prompts, sheets, unet
from assets.pocket.build.__main__ import FIGURES, FIGURES_END, main, write_card
from tests.registry import skip_without_registry
from trainers.errors import TrainingError


@pytest.mark.skipif(not os.environ.get("WHOLE_BUILD"), reason="the whole build takes most of a minute: WHOLE_BUILD=1 runs it")
def test_the_whole_build_from_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_registry()
    # Every stage does all that it does, with few pictures: more, or twenty steps for each, only make it prettier.
    monkeypatch.setattr(evaluate, "PLAIN_PICTURES", 16)
    monkeypatch.setattr(sheets, "COLUMNS", 3)
    monkeypatch.setattr(prompts, "STEPS", 2)
    monkeypatch.setattr(unet, "draw_prompts", partial(unet.draw_prompts, steps=2))
    work, card = tmp_path / "work", tmp_path / "card.md"
    card.write_text(f"# Card\n\n{FIGURES}\nold\n{FIGURES_END}\n\nThe end.\n", encoding="utf-8")
    assert main(["all", "--work", str(work), "--recipe", "tiny", "--card", str(card)]) == 0

    pipeline = StableDiffusionPipeline.from_pretrained(work / "pocket", torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a red apple, noto style", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert image.size == (64, 64)
    assert pipeline.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert max(path.stat().st_size for path in (work / "pocket").rglob("*.safetensors")) < 20 * 2**20

    figures = json.loads((work / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert figures["prompts"] == 4
    text = card.read_text(encoding="utf-8")
    assert "| VAE PSNR, 256 plain pictures, dB |" in text and "old" not in text and text.endswith("The end.\n")
    assert {path.name for path in (work / "sheets").iterdir()} == {"1-prompts.png", "3-styles.png", "4-vae.png"}

    for stage, steps in (("vae", 4), ("text", 3), ("unet", 4)):
        state = torch.load(work / stage / "checkpoint.pt", weights_only=True)
        assert state["step"] == steps


def test_a_card_without_a_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Card\n", encoding="utf-8")
    with pytest.raises(TrainingError, match="no place for figures"):
        write_card(tmp_path / "card.md", "figures")


def test_a_stage_without_its_input_is_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vae", "--work", str(tmp_path)]) == 2
    assert "fetch" in capsys.readouterr().err
