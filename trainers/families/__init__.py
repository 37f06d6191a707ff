"""The model families: recognising a base model from its small files and headers, and loading it. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.errors import BaseModelError, SettingError
from trainers.families.configuration import prediction_type_of, read_configs, read_json, read_sizes
from trainers.families.expected import check_tensors
from trainers.families.facts import ASSETS, FAMILIES, BaseModelFacts, BaseOptions, FamilyFacts
from trainers.families.locate import find_path, locate_base, name_of
from trainers.families.single_file import ZERO_TERMINAL, recognise_file, set_epsilon
from trainers.families.stored import denoiser_bytes, stored_tensors, weight_files
from trainers.families.vocabulary import MERGES_FILE, WORDS, WORDS_FILE, number_words, only_merges, read_merges

if TYPE_CHECKING:
    from trainers.families.base import DiffusionModel

__all__ = [
    "ASSETS", "FAMILIES", "BaseModelFacts", "BaseOptions", "FamilyFacts", "check_size", "denoiser_bytes", "load_family",
    "locate_base", "recognise_base", "stored_tensors", "weight_files",
]  # fmt: skip
"""Of CLIP's vocabulary, begin and end marks included."""
LARGEST_SIDE = 4096
"""Of a picture to draw, in pixels."""


def recognise_base(model: str, options: BaseOptions | None = None) -> BaseModelFacts:
    """What a base model is, from its configuration files or its single file's header; no weight is read.

    Raises BaseModelError naming the part that is missing or unknown, SettingError for options that do not fit it.
    """
    options = options or BaseOptions()
    source, vae = locate_base(model), _own_vae(options.vae)
    single = source.is_file()
    configs, guessed = recognise_file(source, vae is not None) if single else (read_configs(source), "")
    if vae is not None and vae.is_dir():
        configs["vae"] = read_json(vae, "config.json")
    sizes = read_sizes(configs, source)
    if options.prediction_type != "auto":
        guessed = ""
        configs["scheduler"]["prediction_type"] = options.prediction_type
        if options.prediction_type == "epsilon" and single:
            set_epsilon(configs, sizes.family.name)
            sizes = read_sizes(configs, source)
    prediction_type = prediction_type_of(configs, source)
    if options.zero_terminal_snr:
        if prediction_type != "v_prediction":
            what = "Zero-terminal SNR needs a base with v-prediction: at pure noise the noise itself says nothing"
            raise SettingError(what, "base.zero_terminal_snr", "Switch it off, or choose such a base.")
        configs["scheduler"] |= ZERO_TERMINAL
    base = BaseModelFacts(
        name="pocket" if model == "pocket" else name_of(source),
        folder=ASSETS / "families" / sizes.family.name if single else source,
        family=sizes.family,
        prediction_type=prediction_type,
        resolution=sizes.resolution,
        latent_channels=sizes.latent_channels,
        pixels_per_latent=sizes.pixels_per_latent,
        step=sizes.step,
        is_pocket=model == "pocket",
        checkpoint=source if single else None,
        vae=vae,
        clip_skip=options.clip_skip,
        configs=configs,
        guessed=guessed,
    )
    if base.layers_read("text_encoder") < 1:
        what = f"Clip skip {options.clip_skip} leaves nothing of a text encoder that has "
        what += f"{configs['text_encoder']['num_hidden_layers']} layers"
        raise SettingError(what, "base.clip_skip", "1 is usual, 2 for many anime models.")
    for part in (*sizes.family.parts, "vae"):
        weight_files(base, part)
    if not single:
        _check_tokenizers(base)
    if vae is not None:
        _check_own_vae(base)
    check_tensors(base)
    return base


def _own_vae(path: str) -> Path | None:
    if not path:
        return None
    vae = find_path(path)
    if vae is None:
        raise SettingError(f"There is no such VAE ({path})", "base.vae", "Give a .safetensors file or a folder, or unset it.")
    return vae


def _check_own_vae(base: BaseModelFacts) -> None:
    """Raises SettingError for a file that is no VAE, and for a VAE that is surely another family's."""
    usual = read_configs(ASSETS / "families" / base.family.name)["vae"].get("scaling_factor")
    scale = base.configs["vae"].get("scaling_factor", usual)
    try:
        holds = any(name.startswith("decoder.") for name in stored_tensors(base, "vae"))
    except BaseModelError as error:
        raise SettingError(f"{error.what} ({error.where})", "base.vae", error.hint) from error
    if not holds:
        raise SettingError(f"There is no VAE in {base.vae}", "base.vae", "Give a VAE's file or folder, or unset it.")
    others = [family.title for family in FAMILIES.values() if _vae_scale(family.name) == scale != usual]
    if others:
        what = f"This VAE is that of {' or '.join(others)}: its scale is {scale}, and {base.family.title} has {usual}"
        raise SettingError(what, "base.vae", f"Give a VAE for {base.family.title}, or unset it.")


def _vae_scale(family: str) -> object:
    return read_configs(ASSETS / "families" / family)["vae"].get("scaling_factor")


def _check_tokenizers(base: BaseModelFacts) -> None:
    for part in base.family.text_encoders:
        folder = base.folder / part.replace("text_encoder", "tokenizer")
        if not any((folder / name).is_file() for name in (WORDS_FILE, MERGES_FILE, "tokenizer.json")):
            raise BaseModelError("The base model has no tokenizer", where=str(folder), hint="Add vocab.json and merges.txt.")
        words = _count_words(folder)
        if words < WORDS:  # transformers takes an empty one without a word
            what = f"The base model's tokenizer knows {words:,} words in place of {WORDS:,}"
            raise BaseModelError(what, where=str(folder), hint="Copy vocab.json and merges.txt again.")


def _count_words(folder: Path) -> int:
    if (folder / WORDS_FILE).is_file():
        return len(read_json(folder, WORDS_FILE))
    if not only_merges(folder):
        return WORDS
    try:
        return len(number_words(read_merges(folder)))
    except (OSError, ValueError) as error:
        what = f"The base model's tokenizer cannot be read: {error}"
        raise BaseModelError(what, where=str(folder), hint="Copy merges.txt again.") from error


def check_size(base: BaseModelFacts, height: int, width: int) -> None:
    """Raises SettingError when the base cannot draw a picture of this size in pixels."""
    unit = base.pixels_per_latent  # diffusers' denoisers pad and cut latents whose sides do not halve
    if any(side % unit or not unit <= side <= LARGEST_SIDE for side in (height, width)):
        hint = f"Both sides must be multiples of {unit}, up to {LARGEST_SIDE}."
        raise SettingError(f"This base cannot draw {width}x{height}", hint=hint)


def load_family(facts: BaseModelFacts, dtype: Any, device: Any) -> DiffusionModel:
    """Reads the weights; `dtype` is the frozen base's torch dtype. Raises BaseModelError for what is damaged or missing."""
    from trainers.families import sd1, sd2, sdxl

    loaders = {"sd1": sd1.load, "sd2": sd2.load, "sdxl": sdxl.load}
    return loaders[facts.family.name](facts, dtype, device)
