"""Tiny random Stable Diffusion 1.x parts for tests: exact module names, widths of 32 and 64, a fixed seed."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "pocket" / "tokenizer"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
WIDTH = 32
"""Width of the text encoder and of the UNet's cross-attention input."""


def tiny_unet(seed: int = 0) -> Any:
    """UNet2DConditionModel, SD1's layout at two levels: noisy latents (B, 4, h, w) with h and w even, context (B, n, 32)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (
            _library("diffusers")
            .UNet2DConditionModel(
                sample_size=16,
                in_channels=4,
                out_channels=4,
                block_out_channels=(32, 64),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=WIDTH,
                attention_head_dim=4,
                norm_num_groups=8,
            )
            .eval()
        )


def tiny_text_encoder(seed: int = 1) -> Any:
    """CLIPTextModel of two layers and width 32 over CLIP's own 49408 tokens: ids (B, n <= 77) -> (B, n, 32)."""
    transformers = _library("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        projection_dim=WIDTH,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # At transformers' own start the states hardly depend on the words (deviation 0.02 at every layer); ten times
        # the token table makes two prompts as different as a trained encoder does.
        model = transformers.CLIPTextModel(config)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(10.0)
    return model.eval()


def tiny_vae(seed: int = 2) -> Any:
    """AutoencoderKL with f = 4: pixels (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/4, W/4)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (
            _library("diffusers")
            .AutoencoderKL(
                in_channels=3,
                out_channels=3,
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 16, 16),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=64,
                scaling_factor=0.18215,
            )
            .eval()
        )


def save_tiny_pipeline(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Writes a complete pipeline in diffusers layout, fp32, with the real CLIP tokenizer; returns `folder`.

    `prediction_type` is "epsilon" or "v_prediction"; `seed` changes the weights of all three parts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tiny_unet(seed).save_pretrained(folder / "unet")
    tiny_text_encoder(seed + 1).save_pretrained(folder / "text_encoder")
    tiny_vae(seed + 2).save_pretrained(folder / "vae")
    (folder / "tokenizer").mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, folder / "tokenizer" / name)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER | {"prediction_type": prediction_type})
    _write_json(folder / "model_index.json", _MODEL_INDEX)
    return folder


def _library(name: str) -> Any:
    """Imported on use, as each takes seconds, and as Any: their type hints are too few to check against."""
    return importlib.import_module(name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


_SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
