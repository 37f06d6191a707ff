"""Opening only regular files, and writing a file whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainers.files import NotRegularError, open_regular, write_atomically


def test_a_regular_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12\r\n3")
    with open_regular(tmp_path / "a") as file:
        assert file.read() == b"12\r\n3"


def test_a_folder_and_a_pipe_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    # Where there are no named pipes a folder stands in: it is no regular file either.
    getattr(os, "mkfifo", os.mkdir)(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(NotRegularError, match="not a regular file"):
            open_regular(path)


def test_a_file_put_in_place_of_a_pipe_or_the_reverse_is_judged_when_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"")
    opened = os.open

    def swap(path: Path, flags: int) -> int:
        path.unlink()
        path.mkdir()
        return opened(path, flags)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(NotRegularError):
        open_regular(tmp_path / "a")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "gone")


@pytest.mark.parametrize("fsync", [True, False])
def test_bytes_or_pieces_become_one_file_and_nothing_else(tmp_path: Path, fsync: bool) -> None:
    write_atomically(tmp_path / "new" / "a", b"whole", fsync=fsync)
    write_atomically(tmp_path / "new" / "b", (piece for piece in (b"in ", b"pieces")), fsync=fsync)
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == {"a": b"whole", "b": b"in pieces"}


@pytest.mark.parametrize("fsync", [True, False])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, fsync: bool) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def pieces() -> Iterator[bytes]:
        yield b"half of the new"
        assert target.read_bytes() == b"old"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(target, pieces(), fsync=fsync)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    flush, rename = os.fsync, os.replace

    def flushing(handle: int) -> None:
        order.append("flushed")
        flush(handle)

    def renaming(source: Path, target: Path) -> None:
        order.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", renaming)
    write_atomically(tmp_path / "a", b"1")
    assert order[:2] == ["flushed", "renamed"]
    order.clear()
    write_atomically(tmp_path / "a", b"2", fsync=False)
    assert order == ["renamed"]


def test_a_folder_that_cannot_be_flushed_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync
    calls: list[int] = []

    def only_files(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(22, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    write_atomically(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_a_name_as_long_as_a_name_can_be_is_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("n" * 255), b"1")
    assert (tmp_path / ("n" * 255)).read_bytes() == b"1"


def test_several_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    def write(letter: bytes) -> None:
        for _ in range(20):
            write_atomically(tmp_path / "a", letter * 1000, fsync=False)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"x", b"y")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() in (b"x" * 1000, b"y" * 1000)
    assert len(list(tmp_path.iterdir())) == 1
