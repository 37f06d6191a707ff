"""Noise, target and weight against diffusers and the papers; everything random against its key."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.objective import Objective, PredictionType, draw_noise, draw_timestep, generator_for, mean_of_squares

ROOT = Path(__file__).resolve().parents[1]
TIMESTEPS = torch.tensor([0, 1, 250, 500, 999])
GOLDEN_TIMESTEPS = [60, 849, 262, 582, 4]  # of seed 0, steps 0 to 4, slot 0, example 0
GOLDEN_NOISE = [0.693702, -0.776072, -0.325272, 1.309569]  # the first of seed 0, step 0, slot 0, example 0


def reference(**settings: Any) -> Any:
    """diffusers' scheduler with Stable Diffusion's noise schedule."""
    values = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"} | settings
    return importlib.import_module("diffusers").DDPMScheduler(**values)


def objective(prediction_type: PredictionType = "epsilon", **settings: Any) -> Objective:
    return Objective(reference(**settings).alphas_cumprod, prediction_type)


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    generator = generator_for("objective")
    return torch.randn(5, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)


@pytest.mark.parametrize("settings", [{}, {"beta_schedule": "linear"}, {"rescale_betas_zero_snr": True}])
def test_add_noise_is_that_of_diffusers(settings: dict[str, Any]) -> None:
    latents, noise = latents_and_noise()
    expected = reference(**settings).add_noise(latents, noise, TIMESTEPS)
    torch.testing.assert_close(objective(**settings).add_noise(latents, noise, TIMESTEPS), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"rescale_betas_zero_snr": True}])
def test_the_v_target_is_diffusers_velocity(settings: dict[str, Any]) -> None:
    latents, noise = latents_and_noise()
    expected = reference(**settings).get_velocity(latents, noise, TIMESTEPS)
    ours = objective("v_prediction", **settings).target(latents, noise, TIMESTEPS)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_the_epsilon_target_is_the_noise_itself() -> None:
    latents, noise = latents_and_noise()
    assert torch.equal(objective().target(latents, noise, TIMESTEPS), noise)


def test_latents_come_back_from_noisy_latents_and_v() -> None:
    latents, noise = latents_and_noise()
    here = objective("v_prediction")
    noisy, v = here.add_noise(latents, noise, TIMESTEPS), here.target(latents, noise, TIMESTEPS)
    alphas = here.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    torch.testing.assert_close(alphas.sqrt() * noisy - (1 - alphas).sqrt() * v, latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weight_is_the_papers(prediction_type: PredictionType, gamma: float) -> None:
    here = objective(prediction_type)
    for timestep in TIMESTEPS.tolist():
        alpha = float(here.alphas_cumprod[timestep].double())
        snr = alpha / (1 - alpha)
        # For v the loss in x0 is scaled by 1 / (SNR + 1), so the weight on it is min(SNR, gamma) / (SNR + 1).
        expected = min(snr, gamma) / (snr if prediction_type == "epsilon" else snr + 1)
        weight = here.weight(torch.tensor([timestep]), gamma)
        assert float(weight) == pytest.approx(expected, rel=1e-4), timestep


def test_v_prediction_divides_by_snr_plus_one() -> None:
    epsilon, v = objective("epsilon").weight(TIMESTEPS, 5.0), objective("v_prediction").weight(TIMESTEPS, 5.0)
    alphas = objective().alphas_cumprod[TIMESTEPS]
    torch.testing.assert_close(v / epsilon, alphas, rtol=1e-5, atol=1e-7)  # SNR / (SNR + 1) is alpha


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_without_gamma_every_weight_is_one(prediction_type: PredictionType) -> None:
    assert torch.equal(objective(prediction_type).weight(TIMESTEPS, None), torch.ones(5))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_zero_terminal_snr_schedule_has_finite_weights_and_targets(prediction_type: PredictionType) -> None:
    here = objective(prediction_type, rescale_betas_zero_snr=True)
    last = torch.tensor([999])
    assert float(here.alphas_cumprod[999]) < 1e-6
    latents, noise = latents_and_noise()
    weight = here.weight(last, 5.0)
    assert torch.isfinite(weight).all()
    assert float(weight) == pytest.approx(1.0 if prediction_type == "epsilon" else 0.0, abs=1e-6)
    assert torch.isfinite(here.target(latents[:1], noise[:1], last)).all()
    torch.testing.assert_close(here.add_noise(latents[:1], noise[:1], last), noise[:1], rtol=1e-3, atol=1e-3)


def test_a_schedule_that_starts_without_noise_has_finite_weights() -> None:
    here = Objective(torch.tensor([1.0, 0.5, 0.0]), "epsilon")
    assert here.weight(torch.tensor([0, 1, 2]), 5.0).tolist() == [0.0, 1.0, 1.0]
    there = Objective(torch.tensor([1.0, 0.5, 0.0]), "v_prediction")
    assert there.weight(torch.tensor([0, 1, 2]), 5.0).tolist() == [0.0, 0.5, 0.0]


def test_mean_of_squares_averages_within_each_example_and_weights_it() -> None:
    prediction, target = torch.zeros(2, 1, 1, 4), torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 2]]).view(2, 1, 1, 4)
    assert mean_of_squares(prediction, target, torch.tensor([1.0, 3.0])).tolist() == [1.0, 3.0]


def test_noise_and_timestep_depend_on_the_key_alone() -> None:
    before = draw_noise((4, 8, 8), 0.0, 1, 2, 3), draw_timestep(1000, 1, 2, 3)
    torch.manual_seed(99)
    torch.randn(7)
    assert torch.equal(draw_noise((4, 8, 8), 0.0, 1, 2, 3), before[0])
    assert draw_timestep(1000, 1, 2, 3) == before[1]
    for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1), (12, 3), (1, 23)):
        assert not torch.equal(draw_noise((4, 8, 8), 0.0, *key), before[0]), key


def test_drawing_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    draw_noise((4, 8, 8), 0.1, 1, 2, 3)
    draw_timestep(1000, 1, 2, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_golden_values_of_noise_and_timesteps() -> None:
    """They must not move: a run that is resumed under a newer version would otherwise go on with other noise."""
    assert [draw_timestep(1000, 0, step, 0, 0) for step in range(5)] == GOLDEN_TIMESTEPS
    noise = draw_noise((4, 8, 8), 0.0, 0, 0, 0, 0).flatten()[:4]
    torch.testing.assert_close(noise, torch.tensor(GOLDEN_NOISE), rtol=0, atol=1e-5)


def test_another_process_draws_the_same_bits() -> None:
    code = (
        "from trainers.objective import draw_noise, draw_timestep\n"
        "print(draw_noise((4, 8, 8), 0.05, 3, 'holdout', 'ab', 1).numpy().tobytes().hex(), draw_timestep(1000, 3, 1, 2, 0))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    noise, timestep = answer.stdout.split()
    assert noise == draw_noise((4, 8, 8), 0.05, 3, "holdout", "ab", 1).numpy().tobytes().hex()
    assert int(timestep) == draw_timestep(1000, 3, 1, 2, 0)


def test_timesteps_are_uniform_over_the_whole_schedule() -> None:
    drawn = torch.tensor([draw_timestep(10, 0, step, 0, 0) for step in range(5000)])
    counts = torch.bincount(drawn, minlength=10)
    assert counts.numel() == 10
    # Binomial with n = 5000, p = 0.1: five standard deviations are 106.
    assert (counts - 500).abs().max() < 5 * math.sqrt(5000 * 0.1 * 0.9)


def test_without_offset_the_noise_is_standard_normal() -> None:
    noise = torch.stack([draw_noise((4, 16, 16), 0.0, 0, step, 0, 0) for step in range(50)]).double()
    n = noise.numel()
    assert abs(float(noise.mean())) < 5 / math.sqrt(n)
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / n)


def test_noise_offset_moves_each_channel_by_a_constant_of_that_deviation() -> None:
    offset, side = 0.3, 4
    plain = torch.stack([draw_noise((4, side, side), 0.0, 0, step, 0, 0) for step in range(1000)]).double()
    moved = torch.stack([draw_noise((4, side, side), offset, 0, step, 0, 0) for step in range(1000)]).double()
    shift = moved - plain
    assert shift.flatten(2).std(dim=2).max() < 1e-6  # the same over the whole channel
    constants = shift.mean(dim=(2, 3)).flatten()
    n = constants.numel()
    assert abs(float(constants.mean())) < 5 * offset / math.sqrt(n)
    assert abs(float(constants.var()) / offset**2 - 1) < 5 * math.sqrt(2 / n)
