"""Captions: saved where they belong, and counted in tokens by the base model's own vocabulary. No torch."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.projects import Project, change_edits
from app.refusals import NOT_FOUND, Refusal
from app.scanning import Look
from trainers.dataset.captions import MAX_BYTES, clean_caption
from trainers.dataset.folder import Example
from trainers.errors import TrainingError
from trainers.families import ASSETS
from trainers.files import write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LIMIT = 75
"""Tokens of a caption that a text encoder reads; with the marks of begin and end they are 77."""
# What CLIP splits text into before it looks words up; as in transformers' CLIPTokenizer.
_MARKS = ("<|startoftext|>", "<|endoftext|>")
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def save_captions(project: Project, look: Look, captions: Mapping[str, str]) -> None:
    """Saves captions by picture name: beside the picture in the project's own folder, else among the project's edits.

    A caption file that serves two pictures stays as it is, and the edit of one goes among the edits. Raises Refusal, with
    nothing saved, for a picture that is not there and for a text that is no caption.
    """
    examples = look.examples
    check_names(look, captions)
    for name, text in captions.items():
        if len(text.encode("utf-8", "replace")) > MAX_BYTES:
            raise Refusal(f"The caption is longer than {MAX_BYTES // 1024} KiB", name, "Only about 75 tokens of it are read.")
    served = Counter(_caption_file(example) for example in examples.values())
    edits: dict[str, str | None] = {}
    for name, given in captions.items():
        text, example = clean_caption(given), examples[name]
        if not project.is_own or served[_caption_file(example)] > 1:
            edits[name] = text
            continue
        path = example.caption_file or example.path.with_suffix(".txt")
        # Flushing each of thousands to the disk would take minutes; after a power cut the old text is there.
        write_atomically(path, f"{text}\n".encode("utf-8", "replace"), fsync=len(captions) < 20)
        edits[name] = None
    change_edits(project, edits, {})


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
        if not (folder / "vocab.json").is_file():
            made = Tokenizer.from_file(str(folder / "tokenizer.json"))
            made.no_truncation()
            made.no_padding()
            return made
        files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
        model = models.BPE.from_file(*files, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=_MARKS[1])
    except Exception as error:  # the library raises plain Exceptions
        hint = "Download the base model's tokenizer folder again."
        raise TrainingError(f"The vocabulary cannot be read: {error}", str(folder), hint) from error
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.add_special_tokens(list(_MARKS))
    return made
