"""Writes a LoRA file: balanced, checked, hashed, written aside and renamed."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from trainers.adapters import ADAPTERS
from trainers.container import Entry, serialise_header
from trainers.device import DTYPES
from trainers.errors import AdapterFileError
from trainers.files import write_atomically
from trainers.formats.hashes import legacy_hash
from trainers.formats.kohya import module_tensors
from trainers.formats.peft import METADATA_KEY, peft_metadata, peft_tensors
from trainers.formats.weights import ModuleWeights, check_module

_SPELLED = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def write(
    path: Path, modules: Mapping[str, ModuleWeights], metadata: Mapping[str, str], dtype: str, form: str, family: str
) -> dict[str, str]:
    """See trainers.formats.write_adapter."""
    if path.suffix != ".safetensors":
        raise AdapterFileError("A LoRA file's name ends in .safetensors", str(path), "Choose such a name.")
    if not modules:
        raise AdapterFileError("There is nothing to write: no layer was adapted", str(path), "Choose other targets.")
    tensors: dict[str, torch.Tensor] = {}
    for name, weights in modules.items():
        check_module(name, weights, str(path))
    modules = with_scale_one(modules) if form == "peft" else with_common_alpha(modules)
    for name, weights in modules.items():
        weights = balance(weights) if dtype == "fp16" else weights
        made = peft_tensors(name, weights) if form == "peft" else module_tensors(name, weights, family)
        if made.keys() & tensors.keys():
            raise AdapterFileError(f"Two modules share the file name of {name}", str(path), "Rename one.")
        tensors |= {key: _cast(key, tensor, DTYPES[dtype], path) for key, tensor in made.items()}
    # Wide numbers first, then by name: the order of the format's own library, which keeps every tensor aligned.
    names = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    data = [_raw_bytes(tensors[name]) for name in names]
    entries, position = [], 0
    for name, raw in zip(names, data, strict=True):
        tensor = tensors[name]
        entries.append((name, Entry(_SPELLED[tensor.dtype], tuple(tensor.shape), position, position + len(raw))))
        position += len(raw)
    # diffusers refuses a kohya file that carries this, as one read from its own form may.
    kept = {key: value for key, value in metadata.items() if key != METADATA_KEY}
    if form == "peft":
        kept[METADATA_KEY] = peft_metadata(modules)
    complete = kept | _hashes(entries, data, kept)
    pieces = [serialise_header(entries, complete), *data]
    try:
        if not path.parent.is_dir():  # a typing error rather than a wish for a new folder
            raise FileNotFoundError(errno.ENOENT, "there is no such folder")
        write_atomically(path, pieces)
    except OSError as error:
        hint = "Check the folder, its rights and the free space."
        raise AdapterFileError(f"The LoRA could not be written: {error.strerror or error}", str(path), hint) from error
    return complete


def with_common_alpha(modules: Mapping[str, ModuleWeights]) -> dict[str, ModuleWeights]:
    """One alpha for each part: the commonest stays, and elsewhere the ratio moves into `up`; a uniform part is untouched.

    diffusers (0.42) gives all of a part's attention layers the commonest alpha, in silence, when a kohya file has several.
    """
    result = dict(modules)
    scaled = {name: weights for name, weights in modules.items() if "up" in weights.factors}  # diffusers reads no others
    for part in dict.fromkeys(name.partition(".")[0] for name in scaled):
        mine = {name: weights for name, weights in scaled.items() if name.partition(".")[0] == part}
        alphas = Counter(weights.alpha for weights in mine.values())
        common = max(alphas, key=lambda alpha: (alpha != 0, alphas[alpha], alpha))
        for name, weights in mine.items():
            result[name] = _with_alpha(weights, common)
    return result


def with_scale_one(modules: Mapping[str, ModuleWeights]) -> dict[str, ModuleWeights]:
    """Every LoRA's alpha becomes its rank, the ratio moving into `up`; where that is so already, nothing changes.

    In peft form alpha stands in metadata that diffusers reads since 0.35 and no other program does: they scale by 1.
    """
    return {
        name: _with_alpha(weights, float(weights.rank)) if "up" in weights.factors else weights
        for name, weights in modules.items()
    }


def _with_alpha(weights: ModuleWeights, alpha: float) -> ModuleWeights:
    if weights.alpha == alpha:
        return weights
    up = (weights.factors["up"].double() * (weights.alpha / alpha)).float()
    return dataclasses.replace(weights, factors={**weights.factors, "up": up}, alpha=alpha)


def balance(weights: ModuleWeights) -> ModuleWeights:
    """Brings the largest numbers of each rank's up and down to like sizes by powers of two; same product, bit for bit.

    A short run leaves `up` near 1e-7, where half precision keeps one digit or none, beside a `down` near 0.1.
    """
    factors = dict(weights.factors)
    for down, up in ADAPTERS[weights.kind].pairs:
        if down in factors and up in factors and not {"t1", "t2"} & factors.keys():  # a core stands between the two
            factors[down], factors[up] = _balanced(factors[down], factors[up])
    return dataclasses.replace(weights, factors=factors)


def _balanced(down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(r, ...) and (out, r, ...) with the same product."""
    down_size, up_size = down.flatten(1).abs().amax(1), up.flatten(1).abs().amax(0)  # (r,), (r,)
    both = (down_size > 0) & (up_size > 0)
    # frexp gives each size's power of two; half of the distance moves from the larger to the smaller.
    shift = torch.where(both, (torch.frexp(down_size)[1] - torch.frexp(up_size)[1]).div(2, rounding_mode="trunc"), 0)
    # Written out one by one, as torch's own powers may be off in the last bit; float32 ends at 2**127.
    powers = torch.tensor([2.0 ** int(power) for power in shift.clamp(-100, 100)], dtype=torch.float32)  # (r,)
    powers = powers.to(down.device)
    return down / powers.reshape(-1, *[1] * (down.ndim - 1)), up * powers.reshape(1, -1, *[1] * (up.ndim - 2))


def _cast(key: str, tensor: torch.Tensor, dtype: torch.dtype, path: Path) -> torch.Tensor:
    """To the CPU and to the file's dtype. Raises AdapterFileError where a number does not fit.

    Alpha stays float32, and DoRA's magnitudes: rounded to half precision they alone would change the weights by 0.05 %.
    """
    exact = key.endswith((".alpha", ".dora_scale", ".lora_magnitude_vector"))
    result = tensor.detach().to("cpu", torch.float32 if exact else dtype).contiguous()
    if not bool(result.isfinite().all()):
        hint = "The learning rate was probably too high. bf16 or fp32 would hold the numbers."
        raise AdapterFileError(f"{key} holds numbers too large for the file's dtype", str(path), hint)
    return result


def _raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _hashes(entries: list[tuple[str, Entry]], data: list[bytes], metadata: Mapping[str, str]) -> dict[str, str]:
    """sshs_model_hash and modelspec's hash over the tensor data; sshs_legacy_hash as if only ss_ metadata were there."""
    digest = hashlib.sha256()
    for piece in data:
        digest.update(piece)
    only_ss = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    return {
        "sshs_model_hash": digest.hexdigest(),
        "sshs_legacy_hash": legacy_hash([serialise_header(entries, only_ss), *data]),
        "modelspec.hash_sha256": "0x" + digest.hexdigest(),
    }
