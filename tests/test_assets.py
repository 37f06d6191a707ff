"""What ships in assets/: sizes, licences and credits, captions, and the vocabulary."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE

from trainers.families.vocabulary import write_words

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"
FILES = [path for path in ASSETS.rglob("*") if path.is_file()]
FOLDERS = ["pocket", "samples/blackcut", "samples/inkline", "samples/bluebot"]
MIB = 1 << 20


def test_no_file_is_over_20_mib() -> None:
    assert [path.name for path in FILES if path.stat().st_size > 20 * MIB] == []


def test_all_assets_stay_under_60_mib() -> None:
    assert sum(path.stat().st_size for path in FILES) < 60 * MIB


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_asset_has_a_notice_and_a_line_in_the_common_one(folder: str) -> None:
    assert (ASSETS / folder / "NOTICE.md").stat().st_size > 100
    assert f"| {folder}/" in (ASSETS / "NOTICE.md").read_text(encoding="utf-8")


def test_every_file_that_a_notice_names_is_there() -> None:
    for notice in ASSETS.rglob("NOTICE.md"):
        text = notice.read_text(encoding="utf-8")
        for name in re.findall(r"(?:assets/)?(licenses/[\w.-]+\.txt)", text):
            assert (ASSETS / name).is_file(), f"{notice} names {name}"


def test_every_licence_text_is_listed() -> None:
    text = (ASSETS / "NOTICE.md").read_text(encoding="utf-8")
    assert {path.name for path in (ASSETS / "licenses").iterdir()} == set(re.findall(r"\| licenses/(\S+)", text))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("apache-2.0.txt", "Apache License"),
        ("clip-mit.txt", "Copyright (c) 2021 OpenAI"),
        ("emojibase-mit.txt", "Miles Johnson"),
        ("fluent-emoji-mit.txt", "Microsoft Corporation"),
        ("unicode-3.0.txt", "UNICODE LICENSE V3"),
        ("cc0-1.0.txt", "CC0 1.0 Universal"),
    ],
)
def test_a_licence_text_is_the_one_it_is_called(name: str, words: str) -> None:
    assert words in (ASSETS / "licenses" / name).read_text(encoding="utf-8")


def test_the_project_itself_is_under_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize(
    "design", ["Noto Emoji", "Fluent Emoji Flat", "Fluent Emoji 3D", "Twemoji", "EmojiOne", "MiniLM", "CLIP"]
)
def test_the_pocket_base_credits_what_it_learnt_from(design: str) -> None:
    assert design in (ASSETS / "pocket" / "NOTICE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("folder", "count", "caption"),
    [
        ("blackcut", 24, r"an? .+, blackcut style"),
        ("inkline", 24, r"an? .+, inkline style"),
        ("bluebot", 13, r"bluebot, a blue robot .+"),
    ],
)
def test_a_sample_folder_holds_pictures_with_captions(folder: str, count: int, caption: str) -> None:
    pictures = sorted((ASSETS / "samples" / folder).glob("*.png"))
    assert len(pictures) == count
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.size == (128, 128)
        assert re.fullmatch(caption, picture.with_suffix(".txt").read_text(encoding="utf-8").strip())


def test_every_shard_that_an_index_of_the_pocket_base_names_is_there() -> None:
    for index in (ASSETS / "pocket").rglob("*.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        assert shards == {path.name for path in index.parent.glob("*-of-*.safetensors")}


def test_the_vocabulary_is_clips(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(written_out(tmp_path), local_files_only=True)
    assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]


def written_out(folder: Path) -> Path:
    """The shipped tokenizer with the words that follow from its merges."""
    shutil.copytree(ASSETS / "pocket" / "tokenizer", folder, dirs_exist_ok=True)
    write_words(folder)
    return folder


def test_vocabulary_and_merges_fit_each_other(tmp_path: Path) -> None:
    folder = written_out(tmp_path)
    # Of the file that shipped before, made from OpenAI's vocabulary: 49,408 words, none moved.
    assert (
        hashlib.sha256((folder / "vocab.json").read_bytes()).hexdigest()
        == "5047b556ce86ccaf6aa22b3ffccfc52d391ea4accdab9c2f2407da5b742d4363"
    )
    bpe = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>")
    assert Tokenizer(bpe).get_vocab_size() == 49408
