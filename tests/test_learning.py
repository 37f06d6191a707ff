"""It learns: a short run on the blackcut sample with pocket moves pictures it never saw towards ink."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
from PIL import Image

from tests.readme_tables import ROOT
from trainers.cli import cli, run_cli
from trainers.demo import PROMPTS
from trainers.measures.colour import mean_saturation
from trainers.measures.outline import outline_share
from trainers.presets import list_presets, preset_text

SAMPLE = ROOT / "assets" / "samples" / "blackcut"


def held_out_labels() -> list[str]:
    """The labels that no training folder, preset or sample prompt may hold."""
    return (ROOT / "tests" / "blackcut_heldout.txt").read_text(encoding="utf-8").split("\n")[:-1]


def with_article(label: str) -> str:
    """'octopus' -> 'an octopus', as the captions of the sample folders say it."""
    return f"{'an' if label[0].lower() in 'aeiou' else 'a'} {label}"


def test_held_out_prompts_occur_in_no_caption_preset_or_sample_prompt() -> None:
    labels = held_out_labels()
    assert len(set(labels)) == len(labels) >= 40
    captions = [path.read_text(encoding="utf-8").strip() for path in SAMPLE.glob("*.txt")]
    assert len(captions) == 24
    trained = {caption.partition(",")[0].partition(" ")[2] for caption in captions}
    assert not trained & set(labels)
    shown = "\n".join([*PROMPTS, *(preset_text(name) for name in list_presets())])
    assert [label for label in labels if f"{label}," in shown or f"{label} " in shown] == []


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of 60 steps on the blackcut sample, and pictures of six held-out prompts at strengths 0 and 1."""
    folder = tmp_path_factory.mktemp("learning")
    settings = ["--set", "samples.every=0", "--set", "prior.prompts=[]", "--set", "train.batch_size=4"]
    assert run_cli(cli, ["train", str(SAMPLE), "--output", str(folder / "run"), "--steps", "60", *settings]) == 0
    lora = next((folder / "run").glob("*.safetensors"))
    prompts = [f"{with_article(label)}, blackcut style" for label in held_out_labels()[:6]]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    drawn = ["--strengths", "0,1", "--guidance", "3", "--steps", "8", "--output", f"{folder / 'pictures'}/"]
    assert run_cli(cli, ["generate", "--lora", str(lora), *asked, *drawn]) == 0
    return folder


def drawn_at(folder: Path, strength: str) -> list[Image.Image]:
    """All pictures at one strength."""
    found = sorted((folder / "pictures").glob(f"*_s{strength}.png"))
    assert len(found) == 6
    return [Image.open(path).convert("RGB") for path in found]


def test_unseen_prompts_gain_outline_with_the_strength(short_run: Path) -> None:
    without, with_lora = (mean(map(outline_share, drawn_at(short_run, strength))) for strength in ("0.00", "1.00"))
    assert without < 0.15
    assert with_lora > without + 0.08


def test_unseen_prompts_lose_colour_with_the_strength(short_run: Path) -> None:
    without, with_lora = (mean(map(mean_saturation, drawn_at(short_run, strength))) for strength in ("0.00", "1.00"))
    assert with_lora < 0.8 * without
