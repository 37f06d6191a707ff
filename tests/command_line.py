"""Runs the `impasto` command in tests: in this process, or apart where signals or a fresh interpreter matter."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

TINY = (
    *("--set", "adapter.rank=4", "--set", "samples.steps=2", "--set", "samples.every=0", "--set", "train.batch_size=2"),
    *("--set", "output.verify=false"),
)
"""Options that make a run on the tiny base take milliseconds a step, and leave out the proof, which has tests of its own."""


def impasto(*words: object) -> int:
    """`impasto WORDS` in this process; returns the exit code."""
    import app.main  # noqa: F401 - adds `ui` to the commands
    from trainers.cli import cli, run_cli

    return run_cli(cli, [str(word) for word in words])


def environment() -> dict[str, str]:
    """The environment for a process apart: this checkout can be imported from any working folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}


def start_apart(*words: object) -> subprocess.Popen[str]:
    """`impasto WORDS` in a process of its own, its stdout to be read line by line."""
    command = [sys.executable, "-P", "-m", "app", *(str(word) for word in words)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


def run_fresh(code: str, *words: object) -> Any:
    """Runs Python code in a fresh interpreter and returns the JSON it prints last."""
    command = [sys.executable, "-P", "-c", code, *(str(word) for word in words)]
    done = subprocess.run(command, env=environment(), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def read_events(run: Path) -> list[dict[str, Any]]:
    """Every line of a run's events.jsonl as strict JSON: NaN and Infinity are errors."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def result_of(run: Path) -> Path:
    """The one LoRA at the top of a run folder."""
    (found,) = run.glob("*.safetensors")
    return found


def tensor_bytes(path: Path) -> bytes:
    """Everything after the header of a .safetensors file."""
    data = path.read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    return data[8 + header :]


def contents(folder: Path) -> dict[str, str]:
    """What lies in a folder, by relative name: content, target of a link, or kind. Follows no link, opens no pipe."""
    import hashlib

    found: dict[str, str] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                text = f"link to {os.readlink(path)}"
            elif path.is_dir():
                text = "folder"
            elif path.is_file() and os.access(path, os.R_OK):
                text = hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size < 1 << 26 else "large"
            else:
                text = "other"
            found[path.relative_to(folder).as_posix()] = f"{text} {path.lstat().st_mtime_ns if text != 'folder' else ''}"
    return found
