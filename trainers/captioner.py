"""The captioner: writes captions for pictures with a model that a person names, in a process of its own, one picture at a time.

`python -P -m trainers.captioner` reads one line of JSON, a CaptionRequest, from stdin and writes events as JSON lines to
stdout: `loading`; `loaded` with the device; `caption` or `skipped` (with `what`) for each picture, by `name`; and one
last of `done`, or `failed` with what, where and hint. All else that prints goes to stderr. The end of stdin ends it at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainers.dataset.captions import clean_caption
from trainers.dataset.pictures import load_small
from trainers.errors import BaseModelError, DatasetError, TrainingError, is_out_of_memory

SIDE = 1024
"""Longest side in pixels of what the model is shown; it scales that down to what it was made for."""
QUESTION = "Describe this picture in one sentence."
"""What a model that answers questions is asked where the person asks nothing."""
_GOES_ON = ("blip", "git")  # a prompt is the beginning of their caption, and no question
_NEEDED = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")

Tell = Callable[[dict[str, Any]], None]


class CaptionRequest(BaseModel):
    """What to describe, and with what."""

    model_config = ConfigDict(strict=True, frozen=True)
    model: str
    """A folder as transformers saves it, or an id on the model hub (owner/name), which is then fetched."""
    prompt: str = ""
    """A question, or how the caption begins, as the model takes it."""
    max_tokens: int = Field(60, ge=1, le=500)
    pictures: list[tuple[str, str]]
    """(name, path) of each."""


def locate_model(text: str) -> Path:
    """The model's folder; fetched when it is no folder here but an id on the hub. Raises BaseModelError when there is none."""
    folder = Path(text).expanduser()
    with contextlib.suppress(OSError, ValueError):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                hint = "Name the folder that holds config.json, tokenizer and weights."
                raise BaseModelError("This folder holds no model of transformers", text, hint)
            return folder
    if text.count("/") != 1 or text.startswith((".", "~", "/")) or "\\" in text:
        raise BaseModelError("There is no such model", text[:200], "Give a folder, or a hub id (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=list(_NEEDED)))
    except Exception as error:  # the network has many
        hint = "Check the name and the network, or download the model and name its folder."
        raise BaseModelError(f"The model cannot be fetched: {error}", text, hint) from error


@dataclass(frozen=True)
class Captioner:
    """A loaded model, what prepares picture and prompt for it, and what turns its tokens into text."""

    model: Any
    processor: Any
    tokenizer: Any


def load_captioner(folder: Path) -> Captioner:
    """The model in a folder, on a GPU where there is one. Never runs a stranger's code.

    Raises BaseModelError when transformers cannot load it as one that reads pictures and writes text.
    """
    from transformers import AutoModelForImageTextToText

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    try:
        # Only safetensors: a pickle may run anything.
        model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
        processor, tokenizer = _load_processor(folder)
    except Exception as error:  # transformers raises whatever it meets
        hint = "It must be a model from pictures to text, with its tokenizer and weights as safetensors."
        raise BaseModelError(f"The model cannot be loaded: {_first_line(error)}", str(folder), hint) from error
    return Captioner(model.to("cuda" if on_gpu else "cpu").eval(), processor, tokenizer)


def describe(captioner: Captioner, image: Image.Image, prompt: str = "", most: int = 60) -> str:
    """The caption of a picture (RGB), of at most `most` tokens. The same picture and prompt always give the same."""
    model, processor = captioner.model, captioner.processor
    text = prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt or QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    given = processor(images=image, return_tensors="pt", **({"text": text} if text else {}))
    given = {name: v.to(model.device, model.dtype if v.is_floating_point() else None) for name, v in given.items()}
    with torch.inference_mode():
        written = model.generate(**given, max_new_tokens=most, do_sample=False)[0]
    read = given["input_ids"][0] if "input_ids" in given else written[:0]
    if model.config.model_type not in _GOES_ON and torch.equal(written[: len(read)], read):
        written = written[len(read) :]
    return clean_caption(str(captioner.tokenizer.decode(written, skip_special_tokens=True)))


def _load_processor(folder: Path) -> tuple[Any, Any]:
    """(what prepares picture and text, what turns tokens into text). Some models have an image processor and no more."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError):
        processor = None
    if getattr(processor, "image_processor", None) is not None and getattr(processor, "tokenizer", None) is not None:
        return processor, processor.tokenizer
    images = AutoImageProcessor.from_pretrained(folder, local_files_only=True)

    def only_the_picture(**given: Any) -> Any:
        return images(given["images"], return_tensors="pt")

    return only_the_picture, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def write_captions(request: CaptionRequest, tell: Tell) -> None:
    """Describes each picture in turn and tells of it; one that cannot be read, or at which the model fails, is skipped.

    Raises BaseModelError, what the model raised where it fails at every picture, and a lack of memory at once.
    """
    tell({"event": "loading"})
    if Path(request.model).expanduser().is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: for a folder nobody is to be asked
    captioner = load_captioner(locate_model(request.model))
    tell({"event": "loaded", "device": str(captioner.model.device)})
    worked, failed = False, None
    for name, path in request.pictures:
        try:
            text = describe(captioner, load_small(Path(path), SIDE), request.prompt, request.max_tokens)
        except DatasetError as error:
            tell({"event": "skipped", "name": name, "what": error.what})
            continue
        except Exception as error:  # of the model's code, by a picture of odd sides, say
            if is_out_of_memory(error):
                raise
            traceback.print_exc()
            failed = error
            tell({"event": "skipped", "name": name, "what": f"The model failed: {_first_line(error)}"})
            continue
        worked = True
        said = {"event": "caption", "text": text} if text else {"event": "skipped", "what": "The model wrote nothing"}
        tell({"name": name, **said})
    if failed and not worked:
        raise failed


def answer_line(line: bytes, tell: Tell) -> None:
    """Does what one line asks for; tells of the end, whatever it is."""
    try:
        write_captions(CaptionRequest.model_validate_json(line), tell)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(piece) for piece in first["loc"])
        tell({"event": "failed", "what": f"The captioner was asked wrongly: {first['msg']}", "where": where, "hint": ""})
    except TrainingError as error:
        tell({"event": "failed", "what": error.what, "where": error.where, "hint": error.hint})
    except Exception as error:  # told to the person, and in full in the log
        traceback.print_exc()
        short = is_out_of_memory(error)
        what = "There is not enough memory for this model" if short else f"The model failed: {_first_line(error)}"
        tell({"event": "failed", "what": what, "where": "", "hint": "Try a smaller model." if short else "See captioner.log."})
    else:
        tell({"event": "done"})


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def main() -> int:
    """Serves stdin and stdout once; returns the exit code."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # so that not even a library's C code prints between the events
        sys.stdout = sys.stderr

        def tell(event: dict[str, Any]) -> None:
            out.write(json.dumps(event) + "\n")
            out.flush()

        line = sys.stdin.buffer.readline()
        threading.Thread(target=_end_with_stdin, daemon=True, name="wait for the end of stdin").start()
        with contextlib.suppress(BrokenPipeError):
            answer_line(line, tell)
    return 0


def _end_with_stdin() -> None:
    # A download or a large model's loading cannot be asked to stop, and there is nothing to save.
    while sys.stdin.buffer.read(1 << 16):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
