"""The queue's file: damage is put aside, what cannot be read for a moment is not, and reading and writing take turns."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from app.queue_file import Entry, QueueFile, QueueState
from app.refusals import Refusal

STATE = QueueState(entries=(Entry(run="one", project="p"),))


@pytest.fixture
def file(tmp_path: Path) -> QueueFile:
    return QueueFile(tmp_path)


def test_damage_is_put_aside(file: QueueFile) -> None:
    file.path.write_text('{"entries": [{"run"')
    assert file.read() == QueueState() and file.path.with_name("queue.damaged").is_file()
    file.write(STATE)
    assert QueueFile(file.path.parent).read() == file.read() == STATE


def test_what_cannot_be_read_for_a_moment_is_no_damage(file: QueueFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    file.path.write_text(STATE.model_dump_json())
    with monkeypatch.context() as fault:
        fault.setattr(Path, "read_text", refuse)
        with pytest.raises(Refusal, match="Permission denied"):
            file.read()
    assert file.read() == STATE
    os.utime(file.path, (1, 1))
    with monkeypatch.context() as fault:
        fault.setattr(Path, "read_text", refuse)
        assert file.read() == STATE  # as it was when it could be read
    assert not file.path.with_name("queue.damaged").exists()


def test_what_is_written_while_damage_is_read_is_not_put_aside(file: QueueFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file.path.write_text("damaged")
    writer = threading.Thread(target=lambda: file.write(STATE))

    real = Path.read_text

    def read(path: Path, *words: Any, **named: Any) -> str:
        if path != file.path:  # of another thread, which waits for a process of an earlier test
            return real(path, *words, **named)
        writer.start()
        writer.join(0.2)
        return "damaged"

    with monkeypatch.context() as slow:
        slow.setattr(Path, "read_text", read)
        assert file.read() == QueueState()
    writer.join()
    assert file.read() == STATE
