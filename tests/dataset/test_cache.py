"""The cache of encoded pictures: what is read back is used, damage is repaired, memory is bounded, keys are honest."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from tests.tiny_runs import tiny_config
from trainers.dataset import batches
from trainers.dataset import cache as cache_module
from trainers.dataset.cache import ContentCache, Entry, cache_key, prune
from trainers.dataset.edits import Edits, write_edits
from trainers.run_folder import RunFolder
from trainers.setup import set_up

KEY = cache_key("something")
START = torch.arange(6.0).view(2, 3)


def never() -> Entry:
    raise AssertionError("this entry was there already")


def stored(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_an_entry_is_computed_once_and_then_held_in_memory(tmp_path: Path) -> None:
    cache = ContentCache(tmp_path)
    first = cache.get(KEY, lambda: {"mean": START})
    assert torch.equal(first["mean"], START)
    for path in stored(tmp_path):
        path.unlink()
    assert cache.get(KEY, never)["mean"] is first["mean"]


def test_an_entry_is_found_by_the_next_run_with_the_same_bits(tmp_path: Path) -> None:
    value = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    ContentCache(tmp_path).get(KEY, lambda: {"mean": value, "deviation": value.exp()})
    again = ContentCache(tmp_path).get(KEY, never)
    assert torch.equal(again["mean"], value) and torch.equal(again["deviation"], value.exp())


def test_the_step_that_fills_an_entry_uses_the_value_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "save", lambda entry: save({name: value + 1 for name, value in entry.items()}))
    assert torch.equal(ContentCache(tmp_path).get(KEY, lambda: {"mean": START})["mean"], START + 1)


def test_without_a_folder_entries_are_kept_in_memory_only() -> None:
    cache = ContentCache(None)
    cache.get(KEY, lambda: {"mean": START})
    assert torch.equal(cache.get(KEY, never)["mean"], START)


def test_an_entry_keeps_no_graph_and_may_be_given_as_a_slice(tmp_path: Path) -> None:
    learning = START.clone().requires_grad_() * 2
    entry = ContentCache(tmp_path).get(KEY, lambda: {"mean": learning.t()})
    assert not entry["mean"].requires_grad and torch.equal(entry["mean"], (START * 2).t())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _scribble(path: Path) -> None:
    path.write_bytes(b"\xff" * 300)


@pytest.mark.parametrize("damage", [_cut, _empty, _scribble])
def test_a_damaged_file_is_computed_again_and_repaired(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    ContentCache(tmp_path).get(KEY, lambda: {"mean": START})
    (path,) = stored(tmp_path)
    damage(path)
    calls = []
    entry = ContentCache(tmp_path).get(KEY, lambda: calls.append(1) or {"mean": START})  # type: ignore[func-returns-value]
    assert calls and torch.equal(entry["mean"], START)
    assert torch.equal(load_file(path)["mean"], START)


def test_no_temporary_file_is_left_behind(tmp_path: Path) -> None:
    ContentCache(tmp_path).get(KEY, lambda: {"mean": START})
    assert [path.suffix for path in stored(tmp_path)] == [".safetensors"]


def test_a_folder_that_cannot_be_written_costs_the_file_and_not_the_run(tmp_path: Path) -> None:
    blocked = tmp_path / "cache"
    blocked.write_text("a file where the folder should be")
    cache = ContentCache(blocked)
    assert torch.equal(cache.get(KEY, lambda: {"mean": START})["mean"], START)
    assert torch.equal(cache.get(KEY, never)["mean"], START)
    assert blocked.is_file()


def test_memory_stays_within_its_bound_and_what_was_used_last_stays() -> None:
    entry = {"mean": torch.zeros(256)}  # 1 KiB
    cache = ContentCache(None, memory_bytes=4096)
    for number in range(4):
        cache.get(str(number), lambda: entry)
    cache.get("0", never)  # used again, so 1 is now the oldest
    cache.get("4", lambda: entry)
    for number in (0, 2, 3, 4):
        cache.get(str(number), never)
    with pytest.raises(AssertionError, match="was there already"):
        cache.get("1", never)


def test_what_left_memory_comes_back_from_disk(tmp_path: Path) -> None:
    cache = ContentCache(tmp_path, memory_bytes=1024)
    for number in range(8):
        cache.get(f"{number:02d}", lambda number=number: {"mean": torch.full((256,), float(number))})  # type: ignore[misc]
    assert [float(cache.get(f"{number:02d}", never)["mean"][0]) for number in range(8)] == [float(n) for n in range(8)]


def test_an_entry_larger_than_the_bound_is_still_served() -> None:
    cache = ContentCache(None, memory_bytes=10)
    assert cache.get("a", lambda: {"mean": torch.ones(100)})["mean"].sum() == 100


def test_little_is_held_of_what_lies_in_a_folder_and_more_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "HELD_BESIDE", 1024)
    monkeypatch.setattr(cache_module, "HELD_ALONE", 8192)
    (tmp_path / "blocked").write_text("a file where the folder should be")
    held = {}
    for name, folder in (("folder", tmp_path / "cache"), ("none", None), ("blocked", tmp_path / "blocked")):
        cache = ContentCache(folder)
        for number in range(8):
            cache.get(f"{number:02d}", lambda: {"mean": torch.zeros(256)})
        held[name] = sum(key in cache._held for key in (f"{number:02d}" for number in range(8)))
    assert held == {"folder": 1, "none": 8, "blocked": 8}


def fill(folder: Path, *days_ago: float) -> list[Path]:
    """One entry for each age, all of one size; returns their files."""
    paths = []
    for number, days in enumerate(days_ago):
        key = cache_key(number)
        ContentCache(folder).get(key, lambda: {"mean": torch.zeros(256)})
        paths.append(next(folder.rglob(f"{key}.*")))
        _age(paths[-1], days)
    return paths


def _age(path: Path, days: float) -> None:
    then = time.time() - days * 24 * 3600
    os.utime(path, (then, then))


def test_pruning_removes_what_was_unused_for_longest_down_to_the_limit(tmp_path: Path) -> None:
    paths = fill(tmp_path, 1, 5, 3, 4, 2)
    size = paths[0].stat().st_size
    assert prune(tmp_path, limit_bytes=3 * size) == 2
    assert stored(tmp_path) == sorted([paths[0], paths[2], paths[4]])
    assert prune(tmp_path, limit_bytes=3 * size) == 0


def test_pruning_leaves_a_cache_within_its_usual_limit_alone(tmp_path: Path) -> None:
    paths = fill(tmp_path, 400, 0)
    assert prune(tmp_path) == 0
    assert stored(tmp_path) == sorted(paths)


def test_an_entry_that_was_read_again_outlives_one_that_was_not(tmp_path: Path) -> None:
    paths = fill(tmp_path, 9, 8)
    ContentCache(tmp_path).get(paths[0].stem, never)
    assert prune(tmp_path, limit_bytes=paths[0].stat().st_size) == 1
    assert stored(tmp_path) == [paths[0]]


def test_reading_an_entry_of_today_writes_nothing(tmp_path: Path) -> None:
    (path,) = fill(tmp_path, 0.5)
    before = path.stat().st_mtime_ns
    ContentCache(tmp_path).get(path.stem, never)
    assert path.stat().st_mtime_ns == before


def test_pruning_clears_what_killed_processes_left_but_not_what_is_being_written(tmp_path: Path) -> None:
    (path,) = fill(tmp_path, 0)
    left, growing = path.parent / ".1-aa.tmp", path.parent / ".2-bb.tmp"
    for file in (left, growing):
        file.write_bytes(b"half")
    _age(left, 2)
    prune(tmp_path)
    assert stored(tmp_path) == sorted([path, growing])


def test_pruning_a_cache_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert prune(tmp_path / "none") == prune(tmp_path / "file") == prune(tmp_path) == 0


def test_keys_tell_kinds_and_borders_of_parts_apart() -> None:
    keys = [cache_key(*parts) for parts in (("a", 1), ("a", "1"), ("a1",), ("a", 1, ""), (("a", 1),), (1, "a"))]
    assert len(set(keys)) == len(keys)
    assert cache_key("a", 1) == cache_key("a", 1)


@pytest.fixture
def entries(tiny_base: Path, pictures: Path, tmp_path: Path) -> Callable[..., set[str]]:
    """entries("dataset.flip=true", ...) -> keys of what one epoch on `pictures` puts into an empty cache."""

    def fill_cache(*overrides: str, base: Path = tiny_base, device: str = "cpu") -> set[str]:
        folder = tmp_path / "cache"
        shutil.rmtree(folder, ignore_errors=True)
        run = RunFolder(tmp_path / "run")
        shutil.rmtree(run.path, ignore_errors=True)
        run.path.mkdir()
        training = set_up(tiny_config(base, pictures, *overrides), run, lambda event: None, cache_folder=folder)
        training.batches._device = dataclasses.replace(training.device, device=torch.device(device))
        for step in range(training.data.plan.steps_per_epoch):
            list(training.batches.step(step))
        return {path.stem for path in stored(folder)}

    return fill_cache


def test_a_second_run_over_the_same_pictures_needs_the_same_entries(entries: Callable[..., set[str]]) -> None:
    first = entries()
    assert len(first) == 6
    assert entries("train.seed=5", "adapter.rank=4", "train.batch_size=3", "dataset.trigger=word") == first


def test_the_key_changes_with_crop_and_size(entries: Callable[..., set[str]]) -> None:
    square = entries()
    assert not square & entries("dataset.resolution=64")
    assert len(square & entries("dataset.buckets=true")) == 4  # only the two oblong pictures are cropped in another way


def test_the_key_changes_with_the_place_of_a_crop(entries: Callable[..., set[str]], pictures: Path, tmp_path: Path) -> None:
    before = entries()
    edits = tmp_path / "edits.json"
    edits.write_bytes(write_edits(Edits(crops={"01.png": (0.0, 0.5), "02.png": (0.5, 1.0), "03.png": (1.0, 1.0)})))
    after = entries(f"dataset.edits={json.dumps(str(edits))}")
    assert len(before - after) == len(after - before) == 2  # the third is square: its crop cannot move


def test_the_key_changes_with_a_flip(entries: Callable[..., set[str]]) -> None:
    plain, mirrored = entries(), entries("dataset.flip=true")
    assert mirrored - plain and mirrored & plain
    assert len(mirrored) == 6


def test_the_key_changes_with_the_pixels_of_one_picture(entries: Callable[..., set[str]], pictures: Path) -> None:
    before = entries()
    with Image.open(pictures / "03.png") as image:
        changed = image.convert("RGB")
    changed.putpixel((5, 5), (1, 2, 3))
    changed.save(pictures / "03.png")
    after = entries()
    assert len(before - after) == len(after - before) == 1


def test_the_key_changes_with_the_vae(entries: Callable[..., set[str]], tiny_base: Path, tmp_path: Path) -> None:
    before = entries()
    other = shutil.copytree(tiny_base, tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.bias"][0] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    assert not before & entries(base=other)


def test_the_key_changes_with_the_kind_of_device_that_encodes(entries: Callable[..., set[str]]) -> None:
    assert not entries() & entries(device="meta")


def test_the_key_changes_with_the_version_of_what_prepares_pictures(
    entries: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = entries()
    monkeypatch.setattr(batches, "PREPROCESSING", batches.PREPROCESSING + 1)
    assert not before & entries()
