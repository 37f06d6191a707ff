"""A report to attach to a question: versions, device, settings, events and the log's end, with paths shortened, no picture."""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainers.run_folder import RunFolder, home_folder

_PACKAGES = ("impasto", "torch", "diffusers", "transformers", "accelerate", "safetensors", "gradio", "pillow", "numpy")
_MOST = 2 * 2**20  # bytes of events and of the log
# Two names and more: a lone "/api" is no path of a disk. Quotes, brackets and line ends close one.
_PATH = re.compile(r"""(?<![\w:/.])(?:[A-Za-z]:)?(?:[\\/]+[^\\/\s"'<>|:,;()\[\]]+){2,}[\\/]*""")
# Asked in a process of its own, so that a broken torch is told too.
_ASK_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"gpus": gpus, "cuda": torch.version.cuda, "mps": torch.backends.mps.is_available(),
  "threads": torch.get_num_threads(), "processor": torch.backends.cpu.get_cpu_capability()}))
"""


def make_report(run: RunFolder | None = None) -> bytes:
    """The zip. What cannot be read is left out, with a line that says so."""
    pieces = {"about.json": json.dumps(_about(), indent=1)}
    if run is not None:
        pieces |= {"config.toml": _read(run.config), "events.jsonl": _read(run.events), "trainer.log": _read(run.log)}
        pieces |= {"manifest.json": _manifest(run), "files.txt": _files(run)}
    secrets = _secrets(run)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in pieces.items():
            archive.writestr(name, shorten(text, secrets))
    return data.getvalue()


def shorten(text: str, secrets: dict[str, str]) -> str:
    """`text` without what tells of a person's disk: known folders and names replaced, other paths cut to their last name."""
    for secret, word in sorted(secrets.items(), key=lambda pair: -len(pair[0])):
        if len(secret) > 2:
            # As JSON writes it, too.
            for written in {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}:
                edge = r"(?<![^\W_]){}(?![^\W_])" if word in ("USER", "HOST") else "{}"
                text = re.sub(edge.format(re.escape(written)), word, text)
    return _PATH.sub(lambda found: ".../" + re.split(r"[\\/]+", found[0].rstrip("\\/"))[-1], text)


def _secrets(run: RunFolder | None) -> dict[str, str]:
    """Folder or name -> the word that stands for it."""
    known = {str(home_folder()): "IMPASTO_HOME", str(Path.home()): "HOME", socket.gethostname(): "HOST"}
    with contextlib.suppress(OSError, KeyError):  # a user without a name
        known[getpass.getuser()] = "USER"
    if run is not None:
        known[str(run.path)] = "RUN"
    return known


def _about() -> dict[str, Any]:
    import psutil

    return {
        "python": sys.version,
        "system": platform.platform(),
        "machine": platform.machine(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "torch": _torch(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "memory_free": psutil.virtual_memory().available,
        "disk_free": _disk_free(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("IMPASTO_", "OMP_", "CUDA_"))
        },
    }


def _disk_free() -> int | None:
    folder = home_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _torch() -> Any:
    try:
        done = subprocess.run([sys.executable, "-P", "-c", _ASK_TORCH], capture_output=True, timeout=60, encoding="utf-8")
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr[-2000:]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return f"cannot be asked: {error}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _read(path: Path) -> str:
    """A file's text, of a long one its end."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MOST))
            data = file.read(_MOST)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}\n"
    text = data.decode("utf-8", "replace")
    return text if size <= _MOST else "(its end)\n" + text.partition("\n")[2]


def _manifest(run: RunFolder) -> str:
    """What went in, counted: the names of pictures are nobody's business."""
    try:
        values = json.loads(run.manifest.read_text(encoding="utf-8"))
        values = {"images": {}, "captions": {}} | values
        for kind in ("images", "captions", "masks", "crops", "prior", "prior_captions"):
            if kind in values:
                values[kind] = len(values[kind])
        values.pop("repeats", None)
        return json.dumps(values, indent=1)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return json.dumps(f"cannot be read: {type(error).__name__}")


def _files(run: RunFolder) -> str:
    """Names and sizes of what lies in the run folder."""
    lines = []
    for folder, _folders, names in os.walk(run.path):
        for name in sorted(names):
            path = Path(folder, name)
            size = path.lstat().st_size if path.exists() else 0
            lines.append(f"{size:>12} {path.relative_to(run.path).as_posix()}")
    return "\n".join(sorted(lines, key=lambda line: line[13:])) + "\n"
