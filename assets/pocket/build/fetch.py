"""Rebuilds the set of training pictures and the tokenizer from published packages: 31 MB of pictures, 104 MB of weights."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import re
import shutil
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from assets.pocket.build.packages import CONCEPTS, RASTERIZER, VOCABULARY, Package, archive, install, read_member
from assets.pocket.build.pictures import DRAWN_SIDE, Picture
from trainers.errors import TrainingError
from trainers.families.vocabulary import END, START, write_words

LARGE = 2 * DRAWN_SIDE
"""Side in pixels at which vector pictures are drawn, to be reduced to half."""
SMALL = 3400
"""Bytes up to which a picture is kept lossless."""
NOTICE = """\
# Base set: where these pictures come from

128 x 128 px RGB WebP on white, one file per (style, concept): `<style>/<code point>.webp`. `captions.jsonl` has one
object a line: file, style (the style word used in captions), label, tags, group, code_point, licence.
Rendered from vector files at 256 px with {rasterizer} and reduced with a Lanczos filter; the 3D set from its 256 px
WebP files. Changes made to the originals: rasterised, put on white, resized, re-encoded (lossless where small, else
quality 93). Left out: people with skin tones, flags, clock faces, keycaps, text buttons, blank or duplicate pictures.

{table}

Texts: {texts}.
"""
LICENCE_FOLDER = Path(__file__).parents[2] / "licenses"
LICENCE_TEXTS = {
    "Apache-2.0.txt": "apache-2.0.txt",
    "fluent-emoji-MIT.txt": "fluent-emoji-mit.txt",
    "emojibase-MIT.txt": "emojibase-mit.txt",
}
"""Name in the set -> file in assets/licenses."""


@dataclass(frozen=True)
class Design:
    """One drawing of the concepts: the folder it fills, its style word in captions, and where it is from."""

    folder: str
    style: str
    title: str
    package: Package
    licence: str
    credit: str


VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
CC_BY = "https://creativecommons.org/licenses/by/4.0/"
DESIGNS = (
    Design(
        "noto", "noto", "Noto Emoji",
        Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
        "Apache-2.0", "Google Inc.",
    ),
    Design(
        "fluent-flat", "fluent flat", "Fluent Emoji Flat",
        Package("@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
        "MIT", "(c) Microsoft Corporation",
    ),
    Design(
        "twemoji", "twemoji", "Twemoji",
        Package("@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
        "CC-BY-4.0", f"(c) Twitter, Inc and other contributors; graphics licensed under CC BY 4.0, {CC_BY}",
    ),
    Design(
        "noto-blob", "noto blob", 'Noto Emoji v1 ("blobs")',
        Package("@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
        "Apache-2.0", "Google Inc.",
    ),
    Design(
        "emojione", "emojione", "EmojiOne 2.3 (continued as EmojiTwo)",
        Package("@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
        "CC-BY-4.0", f"EmojiOne / the EmojiTwo contributors, {CC_BY}",
    ),
    Design(
        "fluent-3d", "fluent 3d", "Fluent Emoji 3D",
        Package("@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
        "MIT", "(c) Microsoft Corporation; packaged by LobeHub",
    ),
)  # fmt: skip
ALL = tuple(design.style for design in DESIGNS)
GROUPS = {0: "smileys", 3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects", 8: "symbols"}
"""Unicode's groups that are kept. People come in skin tones and flags need words: neither is for a tiny model."""
SYMBOLS = re.compile("arrow|circle|square|diamond|triangle|star|check|cross mark")
"""Of the symbols, only shapes."""
LEFT_OUT = re.compile("^Japanese |o’clock|-thirty|button")
"""Buildings and dolls that only their country's name tells apart, clock faces, text in a box."""


def fetch(work: Path, styles: Sequence[str] = ALL, limit: int | None = None) -> Path:
    """Makes work/"base-set": `<folder>/<code point>.webp` of 128 px on white, captions.jsonl, NOTICE.md and LICENSES.

    styles: style words out of ALL. limit: only the first so many concepts. Archives in work/packages are used as they are,
    and a set made before with the same styles and limit is returned at once. Raises TrainingError where a package cannot be
    had or is not the pinned one.
    """
    unknown = sorted(set(styles) - set(ALL))
    if unknown:
        raise TrainingError(f"There is no style {unknown[0]!r}", where="styles", hint=f"Choose among {', '.join(ALL)}.")
    folder, mark = work / "base-set", work / "base-set.json"
    made = json.dumps({"styles": list(styles), "limit": limit})
    if mark.is_file() and mark.read_text(encoding="utf-8") == made:
        return folder
    mark.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    entries = read_concepts(archive(work, CONCEPTS))[:limit]
    used = [design for design in DESIGNS if design.style in styles]
    lines = [
        json.dumps(vars(picture), ensure_ascii=False) for design in used for picture in draw(work, folder, design, entries)
    ]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_notice(folder, used)
    mark.write_text(made, encoding="utf-8")
    return folder


def read_concepts(path: Path) -> list[dict[str, Any]]:
    """The kept entries of emojibase in its order: dicts with label, hexcode, tags and a group number that GROUPS has."""
    with tarfile.open(path) as tar:
        entries = json.loads(read_member(tar, "package/en/data.json"))
    return [entry for entry in entries if is_kept(entry)]


def is_kept(entry: Mapping[str, Any]) -> bool:
    """Whether a small model can learn to draw it: one thing, no people, no writing."""
    group, label = entry.get("group"), entry["label"]
    if group not in GROUPS or LEFT_OUT.search(label):
        return False
    return GROUPS[group] != "symbols" or (SYMBOLS.search(label) is not None and not label.startswith("input "))


def draw(work: Path, folder: Path, design: Design, entries: Sequence[Mapping[str, Any]]) -> Iterator[Picture]:
    """Writes the design's pictures of the entries and tells of each. Blank ones and copies of an earlier one are left out."""
    (folder / design.folder).mkdir(parents=True, exist_ok=True)
    renders = render_icons if design.package.name.startswith("@iconify-json/") else read_renders
    seen: set[bytes] = set()
    for entry, image in renders(work, design, entries):
        pixels = np.asarray(image)
        if pixels.std() < 5 or pixels.tobytes() in seen:  # 5 of 255: a white square on white
            continue
        seen.add(pixels.tobytes())
        file = f"{design.folder}/{entry['hexcode'].lower()}.webp"
        (folder / file).write_bytes(encode(image))
        tags, group = tuple(entry.get("tags", ())), GROUPS[entry["group"]]
        yield Picture(file, design.style, entry["label"], tags, group, entry["hexcode"], design.licence)


def render_icons(
    work: Path, design: Design, entries: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], Image.Image]]:
    """Each entry that an iconify package has an icon of, by its very name, with the icon drawn on white."""
    install(work, RASTERIZER)
    resvg = importlib.import_module("resvg_py")
    with tarfile.open(archive(work, design.package)) as tar:
        icons = json.loads(read_member(tar, "package/icons.json"))
    for entry in entries:
        icon = icons["icons"].get(icon_name(entry["label"]))
        if icon is None or icon.get("hidden"):
            continue
        left, top, width, height = (
            icon.get(name, icons.get(name, usual)) for name, usual in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{LARGE}" height="{LARGE}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
        png = bytes(resvg.svg_to_bytes(svg_string=svg, skip_system_fonts=True))
        yield entry, to_drawn_side(on_white(read_rgba(png)))


def icon_name(label: str) -> str:
    """The label as iconify names its icons: "woman’s hat" -> "womans-hat", "piñata" -> "pinata"."""
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", label.lower()) if not unicodedata.combining(sign))
    return re.sub("[^a-z0-9]+", "-", re.sub("[’'“”!.:,]", "", plain)).strip("-")


def read_renders(
    work: Path, design: Design, entries: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], Image.Image]]:
    """Each entry that a package of ready pictures named by code point has, in the order of those names."""
    wanted = {bare(entry["hexcode"]): entry for entry in entries}
    found: dict[str, bytes] = {}
    with tarfile.open(archive(work, design.package)) as tar:
        for member in tar:  # in the archive's own order: to jump about in it would unpack it again and again
            path = Path(member.name)
            if path.parent == Path("package/assets") and bare(path.stem) in wanted:
                found[path.stem] = read_member(tar, member.name)
    files = {bare(name): found[name] for name in sorted(found, key=lambda stem: f"{stem}.")}
    for code_points, content in files.items():
        yield wanted[code_points], on_white(to_drawn_side(read_rgba(content)))


def bare(code_points: str) -> str:
    """The code points without variation selectors, which some packages write and some leave out."""
    return "-".join(point for point in code_points.lower().split("-") if point != "fe0f")


def read_rgba(content: bytes) -> Image.Image:
    """A picture file as red, green, blue and how much it covers."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGBA")


def on_white(image: Image.Image) -> Image.Image:
    """Red, green and blue, with white where the picture does not cover."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_drawn_side(image: Image.Image) -> Image.Image:
    """The picture at the side of the set; one that is not square keeps its shape, with white beside it."""
    return ImageOps.pad(image, (DRAWN_SIDE, DRAWN_SIDE), Image.Resampling.LANCZOS, "white")


def encode(image: Image.Image) -> bytes:
    """WebP: lossless where that is small, else at quality 93, where nobody sees a difference."""
    exact, close = io.BytesIO(), io.BytesIO()
    image.save(exact, "WEBP", lossless=True, quality=40, method=2)
    image.save(close, "WEBP", quality=93)
    small = exact.tell() <= SMALL or exact.tell() < 1.15 * close.tell()
    return (exact if small else close).getvalue()


def write_notice(folder: Path, designs: Sequence[Design]) -> None:
    """NOTICE.md and LICENSES: what is from whom, under which licence, and what was changed."""
    rows = [
        f"| {design.folder} | {design.style} | {design.title} | {design.package.name} {design.package.version} "
        f"| {design.licence} | {design.credit} |"
        for design in designs
    ]
    table = "\n".join(
        [
            "| folder | style word | design | package (npm) | licence | credit |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            f"| captions | - | CLDR labels and tags | {CONCEPTS.name} {CONCEPTS.version} | MIT | (c) Miles Johnson; "
            "labels and keywords from Unicode CLDR (Unicode License) |",
        ]
    )
    texts = ", ".join(f"LICENSES/{name}" for name in LICENCE_TEXTS)
    notice = NOTICE.format(table=table, texts=texts, rasterizer=f"{RASTERIZER.name} {RASTERIZER.version}")
    (folder / "NOTICE.md").write_text(notice, encoding="utf-8")
    (folder / "LICENSES").mkdir(exist_ok=True)
    for name, source in LICENCE_TEXTS.items():
        shutil.copyfile(LICENCE_FOLDER / source, folder / "LICENSES" / name)


def write_tokenizer(work: Path, folder: Path) -> None:
    """Writes CLIP's byte-pair vocabulary as vocab.json, merges.txt and tokenizer_config.json. Raises TrainingError."""
    wheel = archive(work, VOCABULARY)
    with zipfile.ZipFile(wheel) as files:
        packed = files.read("open_clip/bpe_simple_vocab_16e6.txt.gz")
    if hashlib.sha256(packed).hexdigest() != VOCABULARY_SHA256:
        raise TrainingError("The vocabulary is not CLIP's", where=str(wheel), hint="Delete the file and start again.")
    # Line 0 is a version; merges after CLIP's 48,894 are not used. Signs, signs that end a word, merges, two marks: 49,408.
    merges = gzip.decompress(packed).decode().split("\n")[1:48895]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    write_words(folder)
    settings = {
        "bos_token": START,
        "eos_token": END,
        "model_max_length": 77,
        "pad_token": END,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
