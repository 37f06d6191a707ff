"""The stages of the pocket build: a killed one goes on to the same weights, and what is drawn over pictures is what it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from assets.pocket.build import unet as unet_stage
from assets.pocket.build import vae as vae_stage
from assets.pocket.build.pictures import Picture, halve
from assets.pocket.build.stage import Budget, Pace, randomness, train
from assets.pocket.build.styles import DRAWN_STYLES, INK, draw_outline, grow, object_mask, vary


class Line(nn.Module):
    """y = a x + b, to be learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2))


def run_line(folder: Path, steps: int) -> Tensor:
    """Trains a line to y = 2 x + 1 and returns what was learnt."""
    line = Line()

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        x = torch.rand(16, generator=randomness(0, step))
        return (line.weights[0] * x + line.weights[1] - (2 * x + 1)).pow(2).mean(), {}

    train(folder, line, Pace(learning_rate=0.05, warmup=5, floor=1.0, ema=0.9), Budget(steps=steps), loss)
    return line.weights.detach().clone()


def test_a_stage_learns_and_hands_on_the_averaged_weights(tmp_path: Path) -> None:
    assert torch.allclose(run_line(tmp_path, 400), torch.tensor([2.0, 1.0]), atol=0.05)


def test_a_stage_that_was_cut_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Cut by a smaller budget: its checkpoint is gone on with. The rate is constant here, so that both see the same one."""
    whole = run_line(tmp_path / "whole", 60)
    run_line(tmp_path / "cut", 23)
    assert torch.equal(run_line(tmp_path / "cut", 60), whole)


def test_a_finished_stage_returns_what_it_had(tmp_path: Path) -> None:
    first = run_line(tmp_path, 30)
    assert torch.equal(run_line(tmp_path, 30), first)


def test_stages_and_steps_draw_different_numbers() -> None:
    drawn = [torch.rand(4, generator=randomness(seed, step)) for seed in range(4) for step in (0, 1, 5000)]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 12


def test_budget_and_pace() -> None:
    assert Budget(steps=10).progress(5, 10**6) == 0.5
    assert Budget(minutes=2).progress(10**6, 60) == 0.5
    pace = Pace(learning_rate=1.0, warmup=10, floor=0.1)
    assert pace.rate(0, 0.0) == pytest.approx(0.1)
    assert pace.rate(99, 0.0) == pytest.approx(1.0)
    assert pace.rate(99, 1.0) == pytest.approx(0.1)
    assert pace.rate(99, 0.5) == pytest.approx(0.55)


def red_disc(count: int = 1) -> Tensor:
    """(count, 3, 128, 128): a red disc of radius 40 on white."""
    rows, columns = torch.meshgrid(torch.arange(128) - 63.5, torch.arange(128) - 63.5, indexing="ij")
    disc = (rows**2 + columns**2 < 40**2).float()
    red = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1)
    return (1 - disc + disc * red).expand(count, 3, 128, 128).clone()


def test_a_border_has_the_asked_width_and_lies_on_the_objects_edge() -> None:
    ink = torch.tensor(INK).view(1, 3, 1, 1)
    for width in (2, 4, 6):
        drawn = draw_outline(red_disc(), width, 0, ink)
        middle = (drawn[0, :, 64] - ink[0, :, 0]).abs().amax(0) < 1e-6
        inked = middle.nonzero().flatten().tolist()
        left, right = [place for place in inked if place < 64], [place for place in inked if place > 64]
        assert len(left) == len(right) == width + 1, width
        assert min(left) < 24 <= max(left)
    assert torch.equal(draw_outline(red_disc(), 0, 0, ink), red_disc())


def test_growing_by_nothing_changes_nothing_and_by_two_makes_a_round_spot() -> None:
    spot = torch.zeros(1, 1, 9, 9)
    spot[0, 0, 4, 4] = 1
    assert torch.equal(grow(spot, 0), spot)
    assert grow(spot, 1).sum() == 5
    assert grow(spot, 2).sum() == 21
    assert object_mask(red_disc()).mean() == pytest.approx(math.pi * 40**2 / 128**2, rel=0.02)


@pytest.mark.parametrize("style", DRAWN_STYLES)
def test_a_drawn_style_stays_a_picture_and_is_seen(style: str) -> None:
    before = red_disc(2)
    after = DRAWN_STYLES[style](before)
    assert after.shape == before.shape
    assert 0 <= float(after.min()) <= float(after.max()) <= 1
    assert float((after - before).abs().mean()) > 0.02
    assert torch.equal(before, red_disc(2)), "the pictures themselves are not written to"


def test_the_first_quarter_stays_as_it_is_and_the_rest_varies_by_the_generator_alone() -> None:
    pictures = red_disc(16)
    first, second = vary(pictures, randomness(3, 1)), vary(pictures, randomness(3, 1))
    assert torch.equal(first, second)
    assert torch.equal(first[:4], pictures[:4])
    assert sum(not torch.equal(a, b) for a, b in zip(first[4:], pictures[4:], strict=True)) >= 10
    assert not torch.equal(first, vary(pictures, randomness(3, 2)))


@torch.no_grad()
def test_folding_makes_latents_of_mean_0_and_deviation_1_and_leaves_the_pictures_alone() -> None:
    torch.manual_seed(0)
    vae: AutoencoderKL = vae_stage.new_vae().eval()
    planes = (torch.rand(12, 3, 128, 128) * 255).byte()
    pixels = halve(planes.float() / 255) * 2 - 1
    before, spread = vae(pixels).sample, vae.encode(pixels).latent_dist.std
    latents = vae_stage.encode(vae, planes)
    vae_stage.fold_statistics(vae, latents)
    folded = vae_stage.encode(vae, planes)
    assert torch.allclose(folded.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(folded.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(vae(pixels).sample, before, atol=1e-4)
    ratio = vae.encode(pixels).latent_dist.std * latents.std((0, 2, 3)).view(1, 4, 1, 1) / spread
    assert torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-3)


def test_the_dark_line_term_makes_a_left_out_line_dearer_than_an_area_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    white = torch.ones(1, 3, 64, 64)
    line, patch = white.clone(), white.clone()
    line[..., 20, 8:56] = -1
    patch[..., 20:26, 20:28] = -1

    def ratio() -> float:
        return float(vae_stage.reconstruction_loss(white, line) / vae_stage.reconstruction_loss(white, patch))

    assert vae_stage.reconstruction_loss(line, line) == 0
    with_term = ratio()
    monkeypatch.setattr(vae_stage, "DARK_LINES", 0.0)
    assert with_term > 1 > ratio()


def picture(label: str, style: str, group: str = "animals") -> Picture:
    return Picture(f"{style}/{label}.webp", style, label, ("pet",), group, "1F431", "MIT")


def test_the_parts_of_the_training_mix() -> None:
    pictures = [
        picture("cat", "noto"),
        picture("cat", "noto blob"),
        picture("otter", "twemoji"),
        picture("otter", "emojione"),
        picture("face with tears of joy", "noto", "smileys"),
    ]
    sources = unet_stage.choose_sources(pictures, ["cat"])
    plain = [(source.label, source.style, source.part) for source in sources if source.part != "drawn style"]
    assert plain == [("cat", "noto", "main"), ("cat", "noto blob", "side style"), ("otter", "twemoji", "side concept")]
    drawn = [source for source in sources if source.part == "drawn style"]
    assert {source.style for source in drawn} == set(DRAWN_STYLES)
    for number, source in enumerate(drawn * 20):
        assert source.style in unet_stage.source_caption(source, randomness(0, number)), "a redrawn picture says so"


def test_timesteps_of_a_batch_fall_into_equal_spans() -> None:
    steps = unet_stage.stratified_timesteps(20, randomness(0, 0))
    assert sorted(int(step) // 50 for step in steps) == list(range(20))
    assert not torch.equal(steps, steps.sort().values)
