"""Tiny random Stable Diffusion parts for tests, of each family: exact module names, widths of 32 to 64, a fixed seed."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from trainers.families.vocabulary import write_words

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "pocket" / "tokenizer"
TOKENIZER_FILES = ("merges.txt", "tokenizer_config.json")
WIDTH = 32
"""Width of the text encoder and of the UNet's cross-attention input."""
WIDTH_2 = 48
"""Width of SDXL's second text encoder."""


def tiny_unet(seed: int = 0, **changes: Any) -> Any:
    """UNet2DConditionModel, SD1's layout at two levels: noisy latents (B, 4, h, w) with h and w even, context (B, n, 32).

    `changes` go into its configuration.
    """
    config: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _library("diffusers").UNet2DConditionModel(**config | changes).eval()


def tiny_sd2_unet(seed: int = 0) -> Any:
    """As `tiny_unet`, in SD2's form: Linear projections around the transformers, and heads counted for each level."""
    return tiny_unet(seed, use_linear_projection=True, attention_head_dim=(4, 8))


def tiny_sdxl_unet(seed: int = 0) -> Any:
    """SDXL's three levels of two layers: latents (B, 4, h, w) with h and w multiples of 4, context (B, n, 80).

    `added_cond_kwargs` are text_embeds (B, 48) and time_ids (B, 6).
    """
    return tiny_unet(
        seed,
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=WIDTH + WIDTH_2,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH_2 + 6 * 8,
    )


def tiny_text_encoder(
    seed: int = 1,
    *,
    width: int = WIDTH,
    activation: str = "quick_gelu",
    kind: str = "CLIPTextModel",
    pad: int = 49407,
    layers: int = 2,
) -> Any:
    """A CLIP text model of few layers over CLIP's own 49408 tokens: ids (B, n <= 77) -> (B, n, width).

    `kind` CLIPTextModelWithProjection gives `text_embeds` (B, width) as well; `pad` is the token that fills a prompt.
    """
    transformers = _library("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # At transformers' own start the states hardly depend on the words (deviation 0.02 at every layer); ten times
        # the token table makes two prompts as different as a trained encoder does.
        model = getattr(transformers, kind)(config)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(10.0)
    return model.eval()


def tiny_text_encoder_2(seed: int = 3, layers: int = 2) -> Any:
    """SDXL's second text encoder, OpenCLIP's form: width 48, gelu, a projection; filled up with token 0."""
    return tiny_text_encoder(seed, width=WIDTH_2, activation="gelu", kind="CLIPTextModelWithProjection", pad=0, layers=layers)


def tiny_vae(seed: int = 2, scaling_factor: float = 0.18215) -> Any:
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
                scaling_factor=scaling_factor,
            )
            .eval()
        )


def save_tiny_pipeline(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Writes a complete pipeline in diffusers layout, fp32, with the real CLIP tokenizer; returns `folder`.

    `prediction_type` is "epsilon" or "v_prediction"; `seed` changes the weights of all three parts.
    """
    parts = {"unet": tiny_unet(seed), "text_encoder": tiny_text_encoder(seed + 1), "vae": tiny_vae(seed + 2)}
    return _save(folder, parts, _SCHEDULER | {"prediction_type": prediction_type}, _MODEL_INDEX)


def save_tiny_sd2(folder: Path, *, prediction_type: str = "v_prediction", seed: int = 0) -> Path:
    """Writes a complete tiny SD2 in diffusers layout, fp32; returns `folder`. Its text encoder's act is OpenCLIP's gelu."""
    text_encoder = tiny_text_encoder(seed + 1, activation="gelu", pad=0)
    parts = {"unet": tiny_sd2_unet(seed), "text_encoder": text_encoder, "vae": tiny_vae(seed + 2)}
    return _save(
        folder, parts, _SCHEDULER | {"prediction_type": prediction_type}, _MODEL_INDEX, filled_with_zero=("tokenizer",)
    )


def save_tiny_sdxl(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0, text_layers: int = 2) -> Path:
    """Writes a complete tiny SDXL in diffusers layout, fp32, with both text encoders and tokenizers; returns `folder`."""
    parts = {
        "unet": tiny_sdxl_unet(seed),
        "text_encoder": tiny_text_encoder(seed + 1, layers=text_layers),
        "vae": tiny_vae(seed + 2, scaling_factor=0.13025),
        "text_encoder_2": tiny_text_encoder_2(seed + 3, text_layers),
    }
    scheduler = _SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "prediction_type": prediction_type}
    return _save(folder, parts, scheduler, _SDXL_INDEX, filled_with_zero=("tokenizer_2",))


def _save(
    folder: Path,
    parts: dict[str, Any],
    scheduler: dict[str, Any],
    index: dict[str, Any],
    filled_with_zero: tuple[str, ...] = (),
) -> Path:
    """`filled_with_zero` names the tokenizers that fill a prompt up with "!", token 0, as OpenCLIP's do."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, model in parts.items():
        model.save_pretrained(folder / part)
    for tokenizer in (name for name in index if name.startswith("tokenizer")):
        (folder / tokenizer).mkdir(exist_ok=True)
        for name in TOKENIZER_FILES:
            shutil.copyfile(TOKENIZER / name, folder / tokenizer / name)
        write_words(folder / tokenizer)
        if tokenizer in filled_with_zero:
            config = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
            _write_json(folder / tokenizer / "tokenizer_config.json", config | {"pad_token": "!"})
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", index)
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
_SDXL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "feature_extractor": [None, None],
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
