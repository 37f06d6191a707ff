"""A base's parts as modules of diffusers and transformers, filled tensor by tensor from either layout on the disk."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainers.background import start_beside
from trainers.errors import BaseModelError
from trainers.families.ckpt import is_ckpt
from trainers.families.expected import match_tensors
from trainers.families.facts import ASSETS, BaseModelFacts
from trainers.families.lean import library
from trainers.families.stored import Stored, stored_tensors
from trainers.families.tensor_files import TensorFiles
from trainers.families.vocabulary import number_words, only_merges, read_merges

TOKENS = 77
CANARY = ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407])
# All that decides a text encoder. Others are not handed on: one of them names code that transformers fetches from the hub.
_TEXT_SETTINGS = {
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
_VOCABULARY = ASSETS / "pocket" / "tokenizer"


class PartsReader:
    """Reads the tensors of a base in threads of its own, in the number format of each part, from when it is entered.

    The VAE is float32: in half precision SDXL's overflows, and others lose colours. Small parts come first.
    """

    def __init__(self, facts: BaseModelFacts, dtype: torch.dtype, device: torch.device) -> None:
        self._facts, self._device = facts, device
        self._dtypes = {part: torch.float32 if part == "vae" else dtype for part in parts_of(facts)}
        self._jobs = self._all_tensors()
        self._next = threading.Lock()
        self._read: dict[tuple[str, str], torch.Tensor | BaseModelError] = {}
        self.digests: dict[tuple[str, str], str] = {}
        """SHA-256 of each tensor's bytes, as it is used: taken here, as later it may have another form in memory."""
        self._news = threading.Condition()
        self._failed: Exception | None = None
        self._stopped = False
        self._threads: list[threading.Thread] = []
        self._cores = torch.get_num_threads()

    def __enter__(self) -> PartsReader:
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join()
        self._read.clear()
        torch.set_num_threads(self._cores)

    def hurry(self) -> None:
        """Reads with one thread more: whoever calls has nothing to do but to wait. A .ckpt is read whole, and once."""
        if self._cores > 1 and not (self._facts.checkpoint and is_ckpt(self._facts.checkpoint)):
            self._begin()

    def take(self, part: str, name: str) -> torch.Tensor:
        """A tensor by its name in the files' headers, without text_model. Raises what stood in the way."""
        with self._news:
            self._news.wait_for(lambda: (part, name) in self._read or self._failed is not None)
            found = self._read.pop((part, name), self._failed)
        if isinstance(found, torch.Tensor):
            return found
        assert found is not None
        raise found

    def _begin(self) -> None:
        thread = start_beside(self._run)
        self._threads += [thread] if thread else []

    def _run(self) -> None:
        try:
            if threading.current_thread() is not threading.main_thread():
                # A team of threads that finds no free core, as the main thread imports, waits more than it works.
                torch.set_num_threads(1)
            with TensorFiles() as files:
                while (job := self._take_job()) is not None and not self._stopped:
                    part, name, stored = job
                    tensor, digest, finite = files.read_as(stored, self._dtypes[part])
                    self.digests[part, name] = digest
                    self._tell(part, name, tensor.to(self._device) if finite else _no_numbers(part, name, stored))
        except Exception as error:  # told to whoever waits for a tensor
            with self._news:
                self._failed = error
                self._news.notify_all()

    def _take_job(self) -> tuple[str, str, Stored] | None:
        with self._next:
            return next(self._jobs, None)

    def _all_tensors(self) -> Iterator[tuple[str, str, Stored]]:
        for part in self._dtypes:
            stored = stored_tensors(self._facts, part)
            for name in sorted(stored, key=lambda name: (str(stored[name].file), stored[name].entry.start)):
                yield part, name, stored[name]

    def _tell(self, part: str, name: str, found: torch.Tensor | BaseModelError) -> None:
        with self._news:
            self._read[part, name] = found
            self._news.notify_all()


def _no_numbers(part: str, name: str, stored: Stored) -> BaseModelError:
    what = f"{part}: {name} holds numbers that are NaN or infinite"
    return BaseModelError(what, where=str(stored.file), hint="Such a model draws black pictures; download it again.")


def parts_of(facts: BaseModelFacts) -> tuple[str, ...]:
    """vae, text_encoder, ... and unet."""
    return ("vae", *facts.family.text_encoders, "unet")


def load_parts(facts: BaseModelFacts, reader: PartsReader, device: torch.device) -> dict[str, Any]:
    """vae, text_encoder, ... and unet, frozen, made of what `reader` reads.

    All parts are checked by their tensors' names and shapes first, so that what is wrong is told before gigabytes are
    read. Raises BaseModelError.
    """
    modules = {part: build_part(facts, part) for part in parts_of(facts)}
    reader.hurry()
    names = {part: _find_tensors(module, facts, part) for part, module in modules.items()}
    for part, module in modules.items():
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        tensors = {name: reader.take(part, plain).reshape(shapes[name]) for name, plain in names[part].items()}
        module.load_state_dict(tensors, assign=True)
        module.requires_grad_(False)
        module.to(device)  # buffers
        module.eval()
    return modules


def build_part(facts: BaseModelFacts, part: str) -> Any:
    """A part without memory for its parameters. Raises BaseModelError for a configuration that builds none."""
    from accelerate import init_empty_weights

    config, made = dict(facts.configs[part]), library()
    try:
        with init_empty_weights(include_buffers=False):
            if part == "unet":
                return made.denoiser.from_config(config)
            if part == "vae":
                return made.vae.from_config(config)
            kind = made.text_encoder if part == "text_encoder" else made.text_encoder_with_projection
            return kind(made.text_config.from_dict({name: config[name] for name in config if name in _TEXT_SETTINGS}))
    except Exception as error:  # whatever a library makes of settings that it does not expect
        what = f"No {part} can be built from the base's configuration: {(str(error) or repr(error)).splitlines()[0][:200]}"
        raise BaseModelError(what, where=str(facts.source), hint="Is it a Stable Diffusion model?") from error


def _find_tensors(module: nn.Module, facts: BaseModelFacts, part: str) -> dict[str, str]:
    """A module's tensors by the names in the headers. Raises BaseModelError for missing and misfitting ones."""
    plain = {name: name.removeprefix("text_model.") for name in module.state_dict()}
    wanted = {plain[name]: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    match_tensors(facts, part, wanted, stored_tensors(facts, part))
    return plain


def fingerprint_of(module: nn.Module, part: str, digests: Mapping[tuple[str, str], str]) -> str:
    """SHA-256 over names, formats, shapes and contents of the weights that a part was filled with."""
    whole = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digests[part, name.removeprefix('text_model.')]}".encode())
    return whole.hexdigest()


def load_tokenizer(facts: BaseModelFacts, part: str) -> Any:
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
        tokenizer = read_tokenizer(vocabulary, **extra)
        known = tokenizer(CANARY[0]).input_ids == CANARY[1]
    except Exception as error:  # its library raises plain Exceptions
        what = f"The tokenizer could not be loaded: {(str(error) or type(error).__name__).splitlines()[0]}"
        raise BaseModelError(what, where=str(vocabulary), hint="Copy vocab.json and merges.txt again.") from error
    if not known:
        hint = "Copy vocab.json and merges.txt again."
        raise BaseModelError("The tokenizer is not CLIP's", where=str(vocabulary), hint=hint)
    return tokenizer


def read_tokenizer(folder: Path, **extra: str) -> Any:
    """A CLIPTokenizer out of a folder that holds the words, or merges alone; `extra` in place of its own marks, as pad_token.

    What its library raises for damaged files it raises, too, and for missing ones nothing.
    """
    kind = library().tokenizer
    if not only_merges(folder):
        return kind.from_pretrained(str(folder), local_files_only=True, model_max_length=TOKENS, **extra)
    merges, settings = read_merges(folder), folder / "tokenizer_config.json"
    own = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    marks = {name: text for name, text in own.items() if name.endswith("_token") and isinstance(text, str)}
    return kind(vocab=number_words(merges), merges=merges, model_max_length=TOKENS, **marks | extra)


def _is_open_clip(facts: BaseModelFacts, part: str) -> bool:
    return facts.family.name == "sd2" or part == "text_encoder_2"
