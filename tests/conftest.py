"""What all tests share: a tiny base model, a folder of pictures, and a home of their own. One thread, no network."""

from __future__ import annotations

import os

# Before torch is imported: with models this small one thread is the fastest, and sums come out the same everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

# (width, height), colour of the ground, colour of the shape, caption
PICTURES: tuple[tuple[tuple[int, int], str, str, str], ...] = (
    ((48, 48), "white", "firebrick", "a red apple, test style"),
    ((64, 48), "ivory", "seagreen", "a green leaf, test style"),
    ((48, 64), "azure", "navy", "a blue fish, test style"),
    ((64, 64), "black", "gold", "a golden coin, test style"),
    ((32, 32), "beige", "purple", "a purple grape, test style"),
    ((64, 64), "white", "saddlebrown", "a brown bear, test style"),
)


def make_pictures(folder: Path) -> Path:
    """Writes 6 different PNGs of 32 to 64 px a side, each with its caption beside it as .txt; returns `folder`."""
    folder.mkdir(parents=True)
    for number, ((width, height), ground, colour, caption) in enumerate(PICTURES):
        image = Image.new("RGB", (width, height), ground)
        draw = ImageDraw.Draw(image)
        draw.ellipse((width // 6, height // 6, width - width // 5, height - 4 - number), fill=colour, outline="black")
        image.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


LONG = ("test_build.py", "test_torture.py", "test_window_journey.py", "test_processes.py", "test_learning.py")
"""Files with tests of half a minute. They come first: at the end, one of them would leave the other process idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of the long files first, else in their order."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def _session_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For fixtures that outlive one test, which `home` reaches too late: nothing may touch the person's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMPASTO_HOME", str(tmp_path_factory.mktemp("session-home")))
        yield


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program's home (caches, runs) of this one test, also for the processes it starts."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("IMPASTO_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny Stable Diffusion 1.x in diffusers layout, epsilon, made once. Read it, never write into it."""
    from tests.tiny_models import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_sd2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_base`, in the form of Stable Diffusion 2.x, v-prediction."""
    from tests.tiny_models import save_tiny_sd2

    return save_tiny_sd2(tmp_path_factory.mktemp("base") / "tiny-sd2")


@pytest.fixture(scope="session")
def tiny_sdxl_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_base`, in the form of Stable Diffusion XL."""
    from tests.tiny_models import save_tiny_sdxl

    return save_tiny_sdxl(tmp_path_factory.mktemp("base") / "tiny-sdxl")


@pytest.fixture
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh folder `pictures` of 6 small PNGs with captions; a test may change it."""
    return make_pictures(tmp_path_factory.mktemp("made") / "pictures")


@pytest.fixture
def start(tiny_base: Path, pictures: Path, tmp_path: Path) -> Any:
    """start("train.batch_size=4", ...) -> Training on `pictures`, before its first update, in a run folder of its own."""
    from tests.tiny_runs import tiny_training

    numbers = itertools.count()
    return lambda *overrides: tiny_training(tiny_base, pictures, tmp_path / f"start-{next(numbers)}", *overrides)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files that carry no configuration pass for ones of real size, until they are loaded."""
    monkeypatch.setattr("trainers.families.check_tensors", lambda base: None)
