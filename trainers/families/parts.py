"""A base's parts as modules of diffusers and transformers, filled tensor by tensor from either layout on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from trainers.errors import BaseModelError
from trainers.families.facts import ASSETS, BaseModelFacts
from trainers.families.stored import stored_tensors
from trainers.families.tensor_files import TensorFiles
from trainers.text import name_list

TOKENS = 77
CANARY = ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407])
# All that decides a text encoder. Others are not handed on: one of them names code that transformers fetches from the hub.
_TEXT_SETTINGS = {
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
_VOCABULARY = ASSETS / "pocket" / "tokenizer"


def load_unet(facts: BaseModelFacts, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """The denoiser, frozen."""
    with _building(facts, "unet"):
        unet = UNet2DConditionModel.from_config(dict(facts.configs["unet"]))
    _fill(unet, facts, "unet", dtype, device)
    return unet


def load_vae(facts: BaseModelFacts, device: torch.device) -> AutoencoderKL:
    """The VAE, frozen, in float32: in half precision SDXL's overflows, and others lose colours."""
    with _building(facts, "vae"):
        vae = AutoencoderKL.from_config(dict(facts.configs["vae"]))
    _fill(vae, facts, "vae", torch.float32, device)
    return vae


def load_text_encoder(facts: BaseModelFacts, part: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A CLIP text encoder, frozen; the second one with the projection of its pooled state."""
    kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    with _building(facts, part):
        given = {name: value for name, value in facts.configs[part].items() if name in _TEXT_SETTINGS}
        encoder = kind(CLIPTextConfig.from_dict(given))
    _fill(encoder, facts, part, dtype, device)
    return encoder


def load_tokenizer(facts: BaseModelFacts, part: str) -> CLIPTokenizer:
    """The tokenizer of a text encoder. A single file has CLIP's own, which ships, with the family's padding.

    Raises BaseModelError for one that is not CLIP's: transformers builds an empty one without a word when its files are
    missing, and training would learn nothing from the captions.
    """
    folder = facts.folder / part.replace("text_encoder", "tokenizer")
    vocabulary = _VOCABULARY if facts.checkpoint is not None else folder
    extra = {}
    if facts.checkpoint is not None:  # OpenCLIP pads with token 0, CLIP with its end mark
        extra["pad_token"] = "!" if _is_open_clip(facts, part) else "<|endoftext|>"
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(vocabulary), local_files_only=True, model_max_length=TOKENS, **extra)
        known = tokenizer(CANARY[0]).input_ids == CANARY[1]
    except Exception as error:  # its library raises plain Exceptions
        what = f"The tokenizer could not be loaded: {(str(error) or type(error).__name__).splitlines()[0]}"
        raise BaseModelError(what, where=str(vocabulary), hint="Copy vocab.json and merges.txt again.") from error
    if not known:
        hint = "Copy vocab.json and merges.txt again."
        raise BaseModelError("The tokenizer is not CLIP's", where=str(vocabulary), hint=hint)
    return tokenizer


def _is_open_clip(facts: BaseModelFacts, part: str) -> bool:
    return facts.family.name == "sd2" or part == "text_encoder_2"


@contextmanager
def _building(facts: BaseModelFacts, part: str) -> Iterator[None]:
    """Inside, modules are built without memory for their parameters; a configuration that builds none is told."""
    try:
        with init_empty_weights(include_buffers=False):
            yield
    except Exception as error:  # whatever a library makes of settings that it does not expect
        first = (str(error) or type(error).__name__).splitlines()[0][:200]
        what = f"No {part} can be built from the base's configuration: {first}"
        raise BaseModelError(what, where=str(facts.source), hint="Is it a Stable Diffusion model?") from error


def _fill(module: nn.Module, facts: BaseModelFacts, part: str, dtype: torch.dtype, device: torch.device) -> None:
    """Reads a part's tensors into its module. Raises BaseModelError for missing, misfitting, or not finite ones."""
    stored = stored_tensors(facts, part)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    where = str(next(iter(stored.values())).file) if stored else str(facts.source)
    plain = {name: name.removeprefix("text_model.") for name in wanted}
    missing = [name for name in wanted if plain[name] not in stored]
    if missing:
        what = f"The {part.replace('_', ' ')} lacks {len(missing)} of its {len(wanted)} tensors ({name_list(missing)})"
        raise BaseModelError(what, where=where, hint="The file is incomplete, or of another kind; download it again.")
    for name, shape in wanted.items():
        given = stored[plain[name]].shape
        if _without_ones(given) != _without_ones(shape):
            what = f"{part}: {name} is {given} in the file, and {shape} in {facts.family.title}"
            raise BaseModelError(what, where=where, hint="This is a model of another kind.")
    tensors = {}
    with TensorFiles() as files:
        for name in sorted(wanted, key=lambda name: (str(stored[plain[name]].file), stored[plain[name]].entry.start)):
            tensor = files.read(stored[plain[name]])
            # torch cannot look into float8.
            wide = tensor.half() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
            if not bool(wide.isfinite().all()):
                what = f"{part}: {name} holds numbers that are NaN or infinite"
                raise BaseModelError(what, where=where, hint="Such a model draws black pictures; download it again.")
            tensors[name] = tensor.reshape(wanted[name]).to(device, dtype)
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)
    module.to(device)  # buffers
    module.eval()


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution and a Linear layer of the same widths hold the same numbers."""
    return shape[:2] if tuple(shape[2:]) == (1, 1) else shape
