"""The trigger word's learned vectors: where they go in a model, what a run writes of them, and files of them put to use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainers.adapters.flat import FlatParameters
from trainers.adapters.pivotal import NO_TRIGGER, VECTORS, vectors_of
from trainers.adapters.plan import VectorPlan
from trainers.adapters.vectors import VectorTable, add_tables
from trainers.config import TrainConfig, read_config
from trainers.dataset.captions import clean_caption
from trainers.errors import AdapterFileError, SettingError
from trainers.families.base import DiffusionModel
from trainers.formats.embeddings import read_embedding
from trainers.run_folder import RunFolder, run_of

_TABLE = "embeddings.token_embedding"
_ARCHITECTURE = "modelspec.architecture"
_TOLD = ("modelspec.", "ss_base_model_version", "ss_sd_model_", "ss_new_sd_model_hash", "ss_steps", "ss_v2", "ss_clip_skip")
"""Beginnings of what of a LoRA's metadata an embedding says too."""


def plan_vectors(config: TrainConfig, model: DiffusionModel) -> list[VectorPlan]:
    """What the trigger word learns in each text encoder; nothing where the adapter has no vectors for it.

    Raises SettingError for start words of which a tokenizer makes nothing.
    """
    adapter, plans = config.adapter, []
    if not adapter.trigger_vectors:
        return []
    trigger = clean_caption(config.dataset.trigger)
    if not trigger:
        raise SettingError(*NO_TRIGGER)
    start = getattr(adapter, "start_words", "").strip() or trigger
    for part in model.parts():
        if part == "unet":
            continue
        tokens = model.word_tokens(part, start)
        if not tokens:
            raise SettingError(f"The base reads nothing in {start!r}", "adapter.start_words", "Give a word it knows.")
        keeps = getattr(adapter, "keep_length", False)
        plans.append(VectorPlan(f"{part}.{_TABLE}", trigger, adapter.trigger_vectors, tokens, keeps))
    return plans


def learn_words(config: TrainConfig, model: DiffusionModel) -> list[VectorPlan]:
    """As `plan_vectors`; from here on the model's tokens are those of the learned word, so its vectors must be put in."""
    plans = plan_vectors(config, model)
    model.words.update({plan.word: plan.count for plan in plans})
    return plans


def trained_vectors(flat: FlatParameters, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Text encoder -> vectors (n, width), of the masters or their running mean `weights` (N,); {} where there are none."""
    return {
        layer.partition(".")[0]: vectors_of({**factors, **flat.constants.get(layer, {})}).detach()
        for layer, factors in flat.split(weights.detach()).items()
        if VECTORS in factors
    }


def metadata_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """What an embedding says about itself, out of what the LoRA of the same run and step would say."""
    told = {name: value for name, value in metadata.items() if name.startswith(_TOLD)}
    told[_ARCHITECTURE] = told[_ARCHITECTURE].removesuffix("/lora") + "/textual-inversion"
    return told | {"modelspec.title": told.get("modelspec.trigger_phrase", "")}


def embedding_path(run: RunFolder, config: TrainConfig, step: int | None = None) -> Path:
    """Where a run writes the embedding of a step, or without one the finished one, which is called as its trigger word."""
    name = clean_caption(config.dataset.trigger) + ("" if step is None else f"-{step:08d}")
    return run.embeddings / f"{name}.safetensors"


def embedding_beside(lora: Path) -> Path | None:
    """The embedding that was trained with a run's LoRA file, finished or a checkpoint; None where there is none."""
    run = run_of(lora)
    if run is None:
        return None
    config = read_config(run.config)
    if not config.adapter.trigger_vectors:
        return None
    step = re.search(r"-(\d{8,})$", lora.stem) if lora.absolute().parent == run.checkpoints.absolute() else None
    path = embedding_path(run, config, int(step[1]) if step else None)
    return path if path.is_file() else None


def add_embedding(model: DiffusionModel, path: Path) -> str:
    """Puts a file's vectors into the model and returns the word that prompts then name them by.

    Raises AdapterFileError for a file that is none, was made for another family, or has a word that is there already.
    """
    embedding = read_embedding(path)
    word = embedding.word
    if _is_there(word, model):
        raise AdapterFileError(f"There are two embeddings of the word {word}", str(path), "Give one of them.")
    tables = {part: table_of(module) for part, module in model.parts().items() if part != "unet"}
    widths = {part: int(table.weight.shape[1]) for part, table in tables.items()}
    has = {part: int(vectors.shape[1]) for part, vectors in embedding.vectors.items()}
    if widths != has:
        what = f"The embedding's vectors are {_joined(has)} wide, and this base's words {_joined(widths)}"
        raise AdapterFileError(what, str(path), "It was made for another kind of base model.")
    for name, table in add_tables(model.parts(), [f"{part}.{_TABLE}" for part in tables]).items():
        vectors = embedding.vectors[name.partition(".")[0]].to(table.weight.device)
        table.words[word] = {VECTORS: vectors}
        model.words[word] = len(vectors)
    return word


def put_in_embeddings(model: DiffusionModel, paths: Iterable[Path]) -> None:
    """Makes the model's learned words those of some files, and no others; of two of the same word the first counts."""
    model.words.clear()
    for part, module in model.parts().items():
        table = None if part == "unet" else table_of(module)
        if isinstance(table, VectorTable):
            table.words.clear()
    for path in paths:
        if not _is_there(read_embedding(path).word, model):
            add_embedding(model, path)


def table_of(encoder: Any) -> nn.Embedding | VectorTable:
    """A text encoder's table of tokens."""
    table: nn.Embedding | VectorTable = encoder.get_input_embeddings()
    return table


def _is_there(word: str, model: DiffusionModel) -> bool:
    return word.casefold() in {known.casefold() for known in model.words}


def _joined(widths: Mapping[str, int]) -> str:
    return " and ".join(str(width) for width in widths.values())
