"""A tokenizer's folder without vocab.json: the words follow from the merges, and damaged merges are told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from trainers.errors import BaseModelError
from trainers.families import ASSETS, BaseOptions, recognise_base
from trainers.families.parts import read_tokenizer
from trainers.families.vocabulary import write_words

SHIPPED = ASSETS / "pocket" / "tokenizer"
TEXTS = ("a photo of a cat", "Über 3 cafés!", "it's <|endoftext|> 日本語 \U0001f98a", "")


def test_merges_alone_read_texts_as_the_words_beside_them_do(tmp_path: Path) -> None:
    whole = shutil.copytree(SHIPPED, tmp_path / "whole")
    write_words(whole)
    short, long = read_tokenizer(SHIPPED), read_tokenizer(whole)
    for text in TEXTS:
        how = {"padding": "max_length", "truncation": True, "max_length": 77}
        assert short(text, **how).input_ids == long(text, **how).input_ids
    assert read_tokenizer(SHIPPED, pad_token="!").pad_token_id == 0 and short.pad_token_id == 49_407
    assert short.get_vocab() == long.get_vocab() and len(short) == 49_408


@pytest.mark.parametrize(
    ("text", "what"), [("#version: 0.2\n", "514 words in place of"), ("a\n", "line 1 of merges.txt is no pair")]
)
def test_damaged_merges_are_told(tiny_base: Path, tmp_path: Path, text: str, what: str) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "tokenizer" / "vocab.json").unlink()
    assert recognise_base(str(base), BaseOptions()).family.name == "sd1"
    (base / "tokenizer" / "merges.txt").write_text(text, encoding="utf-8")
    with pytest.raises(BaseModelError, match=what):
        recognise_base(str(base), BaseOptions())
