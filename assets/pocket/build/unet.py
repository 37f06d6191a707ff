"""The denoiser stage: everything that the pocket base knows of shapes is learnt here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from assets.pocket.build.captions import caption
from assets.pocket.build.pictures import Picture, halve, tile, to_images, to_model
from assets.pocket.build.stage import Budget, Pace, autocast, pick_device, randomness, train
from assets.pocket.build.styles import DRAWN_STYLES

BATCH = 64
"""Examples a step on two cores: two threads then do 95 % of what two processes of one thread each would."""
SEED = 2
CAPTIONS = 5
"""Captions of each picture, encoded once."""
EMPTY = 0.1
"""Share of examples that see the empty caption, for classifier-free guidance (arXiv 2207.12598)."""
MIN_SNR_GAMMA = 5.0
MAIN_STYLES = ("noto", "fluent flat", "fluent 3d", "twemoji")
SIDE_STYLES = ("noto blob", "emojione")
SIDE_GROUPS = ("animals", "food", "travel", "activities", "objects")
SHARES = {"main": 0.52, "side style": 0.07, "side concept": 0.21, "drawn style": 0.2}
"""How often the examples of each part are seen. Main: the easy concepts in the four main styles, which the bars ask for."""
SHEET_PROMPTS = tuple(
    f"a {label}, {style} style"
    for label in ("red heart", "cat face", "rocket", "strawberry", "house", "guitar", "fox", "snowman")
    for style in ("noto", "fluent 3d", "twemoji", "outlined")
)


def noise_schedule() -> DDIMScheduler:
    """Stable Diffusion 1.5's: scaled linear from 0.00085 to 0.012 over 1,000 timesteps, epsilon."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    """An untrained denoiser of 17 million parameters. attention_head_dim is the number of heads here: all are 32 wide."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128, 256),
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=192, attention_head_dim=(2, 4, 8), norm_num_groups=16,
    )  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One picture as the denoiser stage sees it: a picture of the set, maybe redrawn, in one part of SHARES."""

    index: int
    """Row of the planes."""
    label: str
    style: str
    """Style word of the caption."""
    tags: tuple[str, ...]
    part: str


def choose_sources(pictures: Sequence[Picture], concepts: Sequence[str]) -> list[Source]:
    """What is trained on. concepts: the labels that count most; others come in when they are short names of things."""
    main, found = set(concepts), []
    for index, picture in enumerate(pictures):
        easy = picture.label in main
        if easy and picture.style in MAIN_STYLES:
            part = "main"
        elif easy and picture.style in SIDE_STYLES:
            part = "side style"
        elif picture.style in MAIN_STYLES and picture.group in SIDE_GROUPS and len(picture.label.split()) == 1:
            part = "side concept"
        else:
            continue
        found.append(Source(index, picture.label, picture.style, picture.tags, part))
        if easy and picture.style in ("noto", "twemoji", "fluent flat"):
            drawn = list(DRAWN_STYLES) if picture.style == "noto" else []
            drawn += ["outlined", "greyscale"] if picture.style == "fluent flat" else []
            drawn += ["sketch", "pastel", "night"] if picture.style == "twemoji" else []
            found += [Source(index, picture.label, style, picture.tags, "drawn style") for style in drawn]
    return found


@dataclass(frozen=True)
class Cache:
    """All that a step reads: nothing in it changes while the denoiser learns."""

    mean: Tensor
    """(S, 4, 16, 16) latents of each source."""
    std: Tensor
    """(S, 4, 16, 16) their posterior's standard deviation."""
    states: Tensor
    """(S, CAPTIONS, 77, 192) text states, float16."""
    empty: Tensor
    """(77, 192) states of the empty caption."""
    chances: Tensor
    """(S,) how often each source is drawn; sums to 1."""


@torch.no_grad()
def make_cache(
    sources: Sequence[Source], planes: Tensor, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> Cache:
    """Encodes every source and its captions. planes (P, 3, 128, 128) uint8."""
    device = pick_device()
    vae, text_encoder = vae.to(device).eval(), text_encoder.to(device).eval()
    means, stds, states = [], [], []
    for start in range(0, len(sources), 64):
        several = sources[start : start + 64]
        drawn = torch.stack([_redraw(planes[source.index], source.style) for source in several])
        posterior = vae.encode(to_model(halve(drawn)).to(device)).latent_dist
        means.append(posterior.mean.cpu())
        stds.append(posterior.std.cpu())
        words = [
            source_caption(source, randomness(SEED + 1, (start + row) * CAPTIONS + form))
            for row, source in enumerate(several)
            for form in range(CAPTIONS)
        ]
        states.append(encode_captions(words, text_encoder, tokenizer).half().unflatten(0, (len(several), CAPTIONS)).cpu())
    counts = {part: sum(source.part == part for source in sources) for part in SHARES}
    chances = torch.tensor([SHARES[source.part] / counts[source.part] for source in sources])
    empty = encode_captions([""], text_encoder, tokenizer)[0].cpu()
    return Cache(torch.cat(means), torch.cat(stds), torch.cat(states), empty, chances / chances.sum())


def source_caption(source: Source, generator: torch.Generator) -> str:
    """A caption of the source. A picture redrawn by a rule always says so: "a cat" alone stays a cat of the sets."""
    words = caption(source.label, source.style, source.tags, generator)
    if source.part == "drawn style" and source.style not in words:
        return f"{words}, {source.style} style"
    return words


def _redraw(plane: Tensor, style: str) -> Tensor:
    """(3, 128, 128) uint8 -> float in 0..1, changed where the style is one of ours."""
    pixels = plane.float() / 255
    return DRAWN_STYLES[style](pixels[None])[0] if style in DRAWN_STYLES else pixels


def encode_captions(words: list[str], text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> Tensor:
    """(N, 77, 192): padded to 77 with end tokens, as Stable Diffusion's pipelines do, so that both see the same states."""
    tokens = tokenizer(words, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return text_encoder(tokens.to(text_encoder.device)).last_hidden_state


def stratified_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """(count,) timesteps 0..999, one from each of `count` equal spans, in random order: less noise in the loss of a batch."""
    places = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return (places * 1000).long().clamp(max=999)


def train_unet(
    folder: Path,
    cache: Cache,
    budget: Budget,
    start: UNet2DConditionModel | None = None,
    sheet: Callable[[nn.Module, Path], None] | None = None,
    batch: int = BATCH,
) -> UNet2DConditionModel:
    """Trains on the cached latents and text states. start: an earlier denoiser to go on from."""
    device = pick_device()
    unet = (start or new_unet()).to(device).train()
    if device.type == "cpu":  # the fused attention's backward takes a quarter of a step on a CPU; the plain one 7 %
        unet.set_attn_processor(AttnProcessor())
    kept = noise_schedule().alphas_cumprod
    snr = kept / (1 - kept)

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        generator = randomness(SEED, step)
        chosen = torch.multinomial(cache.chances, batch, replacement=True, generator=generator)
        latents = cache.mean[chosen] + cache.std[chosen] * torch.randn(batch, 4, 16, 16, generator=generator)
        form = torch.randint(CAPTIONS, (batch,), generator=generator)
        states = cache.states[chosen, form].float()
        states[torch.rand(batch, generator=generator) < EMPTY] = cache.empty
        timesteps = stratified_timesteps(batch, generator)
        noise = torch.randn(latents.shape, generator=generator)
        signal = kept[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        with autocast():
            prediction = unet(noisy.to(device), timesteps.to(device), states.to(device)).sample
        errors = functional.mse_loss(prediction.float(), noise.to(device), reduction="none").mean((1, 2, 3))
        weights = (MIN_SNR_GAMMA / snr[timesteps]).clamp(max=1).to(device)
        return (errors * weights).mean(), by_quarter(errors.detach().cpu(), timesteps)

    pace = Pace(learning_rate=1e-3 if start is None else 8e-4, warmup=150)
    train(folder, unet, pace, budget, loss, sheet)
    unet.set_default_attn_processor()
    return unet.eval()


def by_quarter(errors: Tensor, timesteps: Tensor) -> dict[str, float]:
    """Mean squared error over all examples and in each quarter of the timesteps, 1 the least noisy."""
    quarters = timesteps // 250
    told = {"mse": float(errors.mean())}
    for quarter in range(4):
        inside = errors[quarters == quarter]
        if len(inside):
            told[f"q{quarter + 1}"] = float(inside.mean())
    return told


def sheet_drawer(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> Callable[[nn.Module, Path], None]:
    """A function that draws SHEET_PROMPTS with a denoiser and saves the sheet."""

    def sheet(unet: nn.Module, path: Path) -> None:
        images = draw_prompts(unet, vae, text_encoder, tokenizer, SHEET_PROMPTS)  # type: ignore[arg-type]
        tile(images, 8).save(path)

    return sheet


@torch.inference_mode()
def draw_prompts(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
    prompts: Sequence[str], guidance: float = 3.0, steps: int = 20, seed: int = 0,
) -> list[Image.Image]:  # fmt: skip
    """Pictures of the prompts by diffusers' pipeline, DPM++ 2M, each from its own seed (seed + place)."""
    scheduler = DPMSolverMultistepScheduler.from_config(noise_schedule().config)
    pipeline = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), 32):
        several = list(prompts[start : start + 32])
        generators = [torch.Generator().manual_seed(seed + start + row) for row in range(len(several))]
        drawn = pipeline(
            several, guidance_scale=guidance, num_inference_steps=steps, generator=generators, output_type="pt"
        ).images
        images += to_images(to_model(drawn))
    return images
