"""Captions: saved where they belong, and counted in tokens by the base model's own vocabulary. No torch."""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.projects import Project, change_edits
from app.refusals import NOT_FOUND, Refusal
from app.scanning import Look
from trainers.dataset.captions import MAX_BYTES, clean_caption, read_caption_file
from trainers.dataset.folder import Example
from trainers.errors import DatasetError, TrainingError
from trainers.families import ASSETS
from trainers.families.vocabulary import END, START, number_words, only_merges, read_merges
from trainers.files import write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LIMIT = 75
"""Tokens of a caption that a text encoder reads; with the marks of begin and end they are 77."""
# What CLIP splits text into before it looks words up; as in transformers' CLIPTokenizer.
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Written:
    """Where a picture's caption is written: among the project's edits, in the file beside the picture; None is not there."""

    edit: str | None = None
    file: str | None = None
    """Of the project's own pictures alone: a folder that the person named is never written to."""


def save_captions(project: Project, look: Look, captions: Mapping[str, str]) -> None:
    """Saves captions by picture name: beside the picture in the project's own folder, else among the project's edits.

    A caption file that serves two pictures stays as it is, and the edit of one goes among the edits. Raises Refusal, with
    nothing saved, for a picture that is not there and for a text that is no caption.
    """
    planned = plan_captions(project, look, captions)
    lay_captions(project, look, {name: after for name, (_, after) in planned.items()})


def plan_captions(project: Project, look: Look, captions: Mapping[str, str]) -> dict[str, tuple[Written, Written]]:
    """Where each of these captions is written now, and where it will be. Raises Refusal as `save_captions` does."""
    examples = look.examples
    check_names(look, captions)
    for name, text in captions.items():
        if len(text.encode("utf-8", "replace")) > MAX_BYTES:
            raise Refusal(f"The caption is longer than {MAX_BYTES // 1024} KiB", name, "Only about 75 tokens of it are read.")
    served = Counter(_caption_file(example) for example in examples.values())
    planned = {}
    for name, given in captions.items():
        text, before = clean_caption(given), find_written(project, look, name)
        beside = project.is_own and served[_caption_file(examples[name])] == 1
        planned[name] = before, Written(file=text) if beside else Written(text, before.file)
    return planned


def find_written(project: Project, look: Look, name: str) -> Written:
    """Where the caption of a picture is written now; a file that cannot be read counts as none."""
    text = None
    beside = look.examples[name].caption_file
    if project.is_own and beside is not None:
        with contextlib.suppress(DatasetError):
            text = read_caption_file(beside).text
    return Written(look.edits.captions.get(name), text)


def lay_captions(project: Project, look: Look, captions: Mapping[str, Written]) -> None:
    """Writes captions where they are said to be. A file that is to be gone was written by the window, and is taken away."""
    for name, written in captions.items():
        example = look.examples[name]
        if not project.is_own or written.file == find_written(project, look, name).file:
            continue
        path = example.caption_file or example.path.with_suffix(".txt")
        if written.file is None:
            path.unlink(missing_ok=True)
        else:
            # Flushing each of thousands to the disk would take minutes; after a power cut the old text is there.
            write_atomically(path, f"{written.file}\n".encode("utf-8", "replace"), fsync=len(captions) < 20)
    change_edits(project, {name: written.edit for name, written in captions.items()}, {})


def check_names(look: Look, names: Mapping[str, object]) -> None:
    """Raises Refusal when one of the names is no picture of the project."""
    unknown = sorted(names.keys() - look.examples.keys())
    if unknown:
        raise Refusal("There is no such picture in this project", unknown[0][:200], "Load the page again.", status=NOT_FOUND)


def _caption_file(example: Example) -> str:
    return str(example.caption_file or example.path.with_suffix(".txt")).casefold()


@dataclass(frozen=True)
class TokenCount:
    """Tokens without the marks of begin and end; `cut` is the first character that is no longer read, None when all is."""

    tokens: int
    cut: int | None


def count_tokens(captions: Sequence[str], base: str = "pocket") -> list[TokenCount]:
    """Counts each caption. `base` is a base model: where it is no folder here, the vocabulary that all families share.

    `cut` counts characters as JavaScript does (UTF-16), so that the page can cut its own text there.
    """
    found = _tokenizer(_vocabulary(base)).encode_batch(list(captions), add_special_tokens=False)
    return [
        TokenCount(len(encoding.ids), _utf16(text, encoding.offsets[LIMIT][0]) if len(encoding.ids) > LIMIT else None)
        for text, encoding in zip(captions, found, strict=True)
    ]


def _utf16(text: str, position: int) -> int:
    return len(text[:position].encode("utf-16-le", "surrogatepass")) // 2


def _vocabulary(base: str) -> Path:
    """The folder with the base's vocabulary. Nothing is fetched for a count: what is not here has CLIP's."""
    folder = Path(base).expanduser() / "tokenizer"
    known = (folder / "tokenizer.json").is_file() or ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file())
    return folder if base != "pocket" and known else ASSETS / "pocket" / "tokenizer"


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Tokenizer:
    """CLIP's tokenizer from vocab.json and merges.txt, else from tokenizer.json. Raises TrainingError when damaged."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    try:
        if (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
            made = Tokenizer.from_file(str(folder / "tokenizer.json"))
            made.no_truncation()
            made.no_padding()
            return made
        merges = read_merges(folder)
        words = number_words(merges) if only_merges(folder) else json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        model = models.BPE(words, merges, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END)
    except Exception as error:  # the library raises plain Exceptions
        hint = "Download the base model's tokenizer folder again."
        raise TrainingError(f"The vocabulary cannot be read: {error}", str(folder), hint) from error
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.add_special_tokens([START, END])
    return made
