"""The VAE stage: pixels (N, 3, 64, 64) <-> latents (N, 4, 16, 16)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from assets.pocket.build.pictures import halve, tile, to_images, to_model
from assets.pocket.build.stage import Budget, Pace, autocast, pick_device, randomness, train
from assets.pocket.build.styles import vary

BATCH = 32
SEED = 1
ANCHOR = 0.03
DARK_LINES = 0.4
KL = 1e-4


def new_vae() -> AutoencoderKL:
    """An untrained VAE of 0.68 million parameters; groups of 8 channels and more, since 2 hide the absolute colour."""
    kinds = (("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3)
    return AutoencoderKL(
        down_block_types=kinds[0], up_block_types=kinds[1], block_out_channels=(16, 32, 64), layers_per_block=1,
        latent_channels=4, norm_num_groups=2, sample_size=64, scaling_factor=1.0,
    )  # fmt: skip


def reconstruction_loss(drawn: Tensor, pixels: Tensor) -> Tensor:
    """Mean error of (N, 3, H, W) against the same in -1..1: L1 + L2 / 2, of edges, of dark lines, and of colours.

    Edges are differences between neighbours. Dark lines: the darkest of 3 x 3 neighbours, where a thin line that is drawn
    too pale counts three times as wide as it is; without it lines of one pixel come out brown or grey. Colours, averaged
    over 4 x 4: without them red and green stay orange for the first 1,500 updates.
    """
    plain = functional.l1_loss(drawn, pixels) + 0.5 * functional.mse_loss(drawn, pixels)
    across = functional.l1_loss(drawn[..., 1:] - drawn[..., :-1], pixels[..., 1:] - pixels[..., :-1])
    down = functional.l1_loss(drawn[..., 1:, :] - drawn[..., :-1, :], pixels[..., 1:, :] - pixels[..., :-1, :])
    small, wanted = functional.avg_pool2d(drawn, 4), functional.avg_pool2d(pixels, 4)
    colour = functional.l1_loss(small, wanted) + 2 * functional.mse_loss(small, wanted)
    dark = functional.l1_loss(-functional.max_pool2d(-drawn, 3, 1), -functional.max_pool2d(-pixels, 3, 1))
    return plain + 0.5 * (across + down) + 0.5 * colour + DARK_LINES * dark


def psnr(drawn: Tensor, pixels: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; both (N, 3, H, W) in -1..1."""
    errors = (drawn.clamp(-1, 1) - pixels).pow(2).mean((1, 2, 3)) / 4
    return float((-10 * errors.clamp(min=1e-9).log10()).mean())


def train_vae(
    folder: Path, planes: Tensor, budget: Budget, start: AutoencoderKL | None = None, batch: int = BATCH
) -> AutoencoderKL:
    """Trains on the pictures (P, 3, 128, 128) uint8; the latents come out with mean 0 and standard deviation 1 a channel.

    start: an earlier VAE to go on from. The latents of unchanged pictures are then held near those it gave, so that a
    denoiser trained on it can go on as well.
    """
    device = pick_device()
    vae = (start or new_vae()).to(device, memory_format=torch.channels_last).train()
    anchors = encode(vae, planes) if start else None
    count = len(planes)

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        generator = randomness(SEED, step)
        chosen = torch.randint(count, (batch,), generator=generator)
        pixels = to_model(halve(vary(planes[chosen].float() / 255, generator)))
        pixels = pixels.to(device, memory_format=torch.channels_last)
        with autocast():
            posterior = vae.encode(pixels).latent_dist
            mean = posterior.mean.float()
            noise = torch.randn(mean.shape, generator=generator).to(device)
            drawn = vae.decode(mean + posterior.std.float() * noise).sample.float()
        kl = posterior.kl().mean() / pixels[0].numel()
        total = reconstruction_loss(drawn, pixels) + KL * kl
        quarter = batch // 4
        told = {
            "psnr": psnr(drawn[:quarter].detach(), pixels[:quarter]),
            "varied": psnr(drawn[quarter:].detach(), pixels[quarter:]),
        }
        if anchors is not None:
            held = functional.mse_loss(mean[:quarter], anchors[chosen[:quarter]].to(device))
            total, told["anchor"] = total + ANCHOR * held, float(held.detach())
        return total, told

    def sheet(module: nn.Module, path: Path) -> None:
        tile(to_images(module(to_model(halve(planes[:: count // 64 + 1].float() / 255))).sample), 16).save(path)  # type: ignore[operator]

    with_sheet = torch.no_grad()(sheet)
    train(folder, vae, Pace(learning_rate=1e-3 if start is None else 5e-4, ema=0.998), budget, loss, with_sheet)
    fold_statistics(vae, encode(vae, planes))
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, planes: Tensor, batch: int = 64) -> Tensor:
    """(P, 3, 128, 128) uint8 -> mean latents (P, 4, 16, 16) float32 on the CPU."""
    found = []
    for start in range(0, len(planes), batch):
        pixels = to_model(halve(planes[start : start + batch].float() / 255)).to(vae.device)
        found.append(vae.encode(pixels).latent_dist.mean.float().cpu())
    return torch.cat(found)


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, latents: Tensor) -> None:
    """Moves each channel's mean and standard deviation into quant_conv and post_quant_conv: latents become mean 0, std 1.

    The scaling factor stays 1, and a white ground is no offset that the denoiser has to learn.
    """
    mean, std = (value.to(vae.device) for value in (latents.mean((0, 2, 3)), latents.std((0, 2, 3))))
    channels = len(mean)
    outward, inward = vae.quant_conv, vae.post_quant_conv
    outward.weight[:channels] /= std.view(-1, 1, 1, 1)
    outward.bias[:channels] = (outward.bias[:channels] - mean) / std
    outward.bias[channels:] -= 2 * std.log()
    inward.bias += (inward.weight[..., 0, 0] * mean).sum(1)
    inward.weight *= std.view(1, -1, 1, 1)
