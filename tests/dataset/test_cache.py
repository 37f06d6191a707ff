"""The cache of encoded pictures: what is read back is used, damage is repaired, memory is bounded, keys are honest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from tests.tiny_runs import tiny_training
from trainers.dataset import cache as cache_module
from trainers.dataset.cache import ContentCache, Entry, cache_key
from trainers.setup import Training

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


def test_keys_tell_kinds_and_borders_of_parts_apart() -> None:
    keys = [cache_key(*parts) for parts in (("a", 1), ("a", "1"), ("a1",), ("a", 1, ""), (("a", 1),), (1, "a"))]
    assert len(set(keys)) == len(keys)
    assert cache_key("a", 1) == cache_key("a", 1)


def entries(training: Training, home: Path) -> set[str]:
    """Keys of what one epoch puts into the cache that was emptied before."""
    folder = home / "cache" / "latents"
    shutil.rmtree(folder, ignore_errors=True)
    for step in range(training.data.plan.steps_per_epoch):
        list(training.batches.step(step))
    return {path.stem for path in stored(folder)}


def test_a_second_run_over_the_same_pictures_needs_the_same_entries(
    tiny_base: Path, pictures: Path, tmp_path: Path, home: Path
) -> None:
    first = entries(tiny_training(tiny_base, pictures, tmp_path / "a"), home)
    more = ("train.seed=5", "adapter.rank=4", "train.batch_size=3", "dataset.trigger=word")
    assert len(first) == 6
    assert entries(tiny_training(tiny_base, pictures, tmp_path / "b", *more), home) == first


def test_the_key_changes_with_crop_and_size(tiny_base: Path, pictures: Path, tmp_path: Path, home: Path) -> None:
    square = entries(tiny_training(tiny_base, pictures, tmp_path / "a"), home)
    large = entries(tiny_training(tiny_base, pictures, tmp_path / "b", "dataset.resolution=64"), home)
    bucketed = entries(tiny_training(tiny_base, pictures, tmp_path / "c", "dataset.buckets=true"), home)
    assert not square & large
    assert len(square & bucketed) == 4  # only the two oblong pictures are cropped in another way


def test_the_key_changes_with_a_flip(tiny_base: Path, pictures: Path, tmp_path: Path, home: Path) -> None:
    plain = entries(tiny_training(tiny_base, pictures, tmp_path / "a"), home)
    mirrored = entries(tiny_training(tiny_base, pictures, tmp_path / "b", "dataset.flip=true"), home)
    assert mirrored - plain and mirrored & plain
    assert len(mirrored) == 6


def test_the_key_changes_with_the_pixels_of_one_picture(tiny_base: Path, pictures: Path, tmp_path: Path, home: Path) -> None:
    before = entries(tiny_training(tiny_base, pictures, tmp_path / "a"), home)
    with Image.open(pictures / "03.png") as image:
        changed = image.convert("RGB")
    changed.putpixel((5, 5), (1, 2, 3))
    changed.save(pictures / "03.png")
    after = entries(tiny_training(tiny_base, pictures, tmp_path / "b"), home)
    assert len(before - after) == len(after - before) == 1


def test_the_key_changes_with_the_vae(tiny_base: Path, pictures: Path, tmp_path: Path, home: Path) -> None:
    before = entries(tiny_training(tiny_base, pictures, tmp_path / "a"), home)
    other = shutil.copytree(tiny_base, tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.bias"][0] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    assert not before & entries(tiny_training(other, pictures, tmp_path / "b"), home)
