"""Base models with random weights in the true architectures, and captioned pictures: the same numbers on every machine.

They are written once, in diffusers layout and fp16, and reused when complete. Nothing is fetched.
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trainers.container import Entry, serialise_header
from trainers.families import ASSETS
from trainers.families.configuration import FILES, read_configs
from trainers.files import write_atomically
from trainers.objective import generator_for

Shapes = dict[str, tuple[int, ...]]
VERSION = 1
"""Of the numbers. Raise it with whatever changes them, so that older ones are not reused."""
_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def synthetic_base(name: str, cache: Path) -> str:
    """What `base.model` says for a case's base: pocket, or the folder below `cache` where its weights lie, made if missing."""
    if name == "pocket":
        return "pocket"
    folder = cache / f"{name}-{VERSION}"
    index = folder / "model_index.json"
    if not index.is_file():  # written last
        configs, source = _configs(name)
        for part, config in configs.items():
            write_atomically(folder / FILES[part], json.dumps(config).encode())
            if part != "scheduler":
                _write_part(folder / part / f"{_WEIGHTS.get(part, 'model')}.safetensors", part, config)
            if part.startswith("text_encoder"):
                _write_tokenizer(source, folder, part.replace("text_encoder", "tokenizer"))
        write_atomically(index, (source / "model_index.json").read_bytes())
    return str(folder)


def _configs(name: str) -> tuple[dict[str, dict[str, Any]], Path]:
    source = ASSETS / "families" / ("sdxl" if name == "sdxl" else "sd1")
    configs = read_configs(source)
    if name in ("tiny", "smallest"):
        for part, changes in _SMALLER[name].items():
            configs[part] |= changes
    return configs, source


def _write_tokenizer(source: Path, folder: Path, name: str) -> None:
    """CLIP's own vocabulary, which ships with pocket, with the family's padding."""
    shutil.copytree(ASSETS / "pocket" / "tokenizer", folder / name, dirs_exist_ok=True)
    settings = [json.loads((path / "tokenizer_config.json").read_text()) for path in (folder / name, source / name)]
    (folder / name / "tokenizer_config.json").write_text(json.dumps(settings[0] | settings[1]), encoding="utf-8")


def _write_part(path: Path, part: str, config: dict[str, Any]) -> None:
    shapes = module_shapes(part, config)
    entries, position = [], 0
    for name, shape in shapes.items():
        entries.append((name, Entry("F16", shape, position, position + 2 * math.prod(shape))))
        position += 2 * math.prod(shape)

    def pieces() -> Iterator[bytes]:
        yield serialise_header(entries, {"format": "pt"})
        for name, shape in shapes.items():
            yield draw_numbers(f"{part}.{name}", shape).view(torch.uint8).numpy().tobytes()

    write_atomically(path, pieces())


def module_shapes(part: str, config: Mapping[str, Any]) -> Shapes:
    """Name -> shape of every tensor of a part, as diffusers and transformers name them; no memory is taken."""
    from accelerate import init_empty_weights

    diffusers, transformers = importlib.import_module("diffusers"), importlib.import_module("transformers")
    with init_empty_weights():
        if part == "unet":
            module = diffusers.UNet2DConditionModel.from_config(config)
        elif part == "vae":
            module = diffusers.AutoencoderKL.from_config(config)
        else:
            kind = "CLIPTextModel" if part == "text_encoder" else "CLIPTextModelWithProjection"
            module = getattr(transformers, kind)(transformers.CLIPTextConfig.from_dict(config))
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def draw_numbers(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Flat, fp16, by the name alone. Matrices are drawn so that what goes through keeps its size, as layers of PyTorch
    begin: 1 / sqrt(3 width). Norms and biases too differ from every other one."""
    drawn = torch.randn(math.prod(shape), generator=generator_for("full size", key))
    if len(shape) < 2:
        scaled = drawn * 0.02 + key.endswith("weight")  # of norms
    elif "embedding" in key:
        scaled = drawn * 0.2
    else:
        scaled = drawn / math.sqrt(3 * math.prod(shape[1:]))
    return scaled.half()


def synthetic_pictures(folder: Path, count: int, side: int) -> Path:
    """`count` different PNGs of `side` x `side` pixels with captions beside them, made where they are missing."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:05d}.png"
        caption = path.with_suffix(".txt")
        if path.exists() and caption.exists():
            continue
        coarse = torch.randint(256, (8, 8, 3), generator=generator_for("picture", number), dtype=torch.uint8)
        image = Image.fromarray(coarse.numpy()).resize((side, side), Image.Resampling.BICUBIC)
        image.save(path, compress_level=1)
        caption.write_text(f"pattern {number} of coloured fields, bench style\n", encoding="utf-8")
    return folder


_SMALLER: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {  # UNet of 12.8 M, text encoder of 15.8 M, VAE of 1.25 M parameters
        "unet": {
            "block_out_channels": [64, 128, 256], "layers_per_block": 1, "cross_attention_dim": 256, "norm_num_groups": 16,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"], "sample_size": 16,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": 4,
        },
        "text_encoder": {
            "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
            "projection_dim": 256,
        },
        "vae": {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1, "norm_num_groups": 16},
    },
    "smallest": {
        "unet": {
            "block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 32, "norm_num_groups": 8,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "sample_size": 8,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": 4,
        },
        "text_encoder": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 32,
        },
        "vae": {
            "block_out_channels": [8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4,
            "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
    },
}  # fmt: skip
