"""How a trainer process is started: a stray file in the working folder must not run in its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import environment


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    """A working folder with files named like our packages."""
    for name in ("trainers.py", "app.py", "torch.py", "json.py"):
        (tmp_path / name).write_text("print('the decoy ran')\n", encoding="utf-8")
    return tmp_path


def output_of(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, encoding="utf-8")
    return done.stdout + done.stderr


def test_a_stray_trainers_file_in_the_working_folder_does_not_run(decoys: Path) -> None:
    said = output_of([sys.executable, "-P", "-m", "trainers", "presets"], decoys)
    assert "For whom" not in said and "the decoy ran" not in said and "pocket" in said


def test_a_stray_app_file_in_the_working_folder_does_not_run(decoys: Path) -> None:
    said = output_of([sys.executable, "-P", "-m", "app", "presets"], decoys)
    assert "the decoy ran" not in said and "pocket" in said


def test_without_the_flag_it_would(decoys: Path) -> None:
    assert "the decoy ran" in output_of([sys.executable, "-m", "trainers", "presets"], decoys)
