"""The run folder: names of the files in it, atomic writes, the lock, the stop flag."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainers.errors import ChangedError, RunFolderError
from trainers.files import write_atomically
from trainers.process_id import place
from trainers.text import printable


def run_of(file: Path) -> RunFolder | None:
    """The run whose result or checkpoint a LoRA file is, by where it lies; None where that is no run folder."""
    for folder in (file.absolute().parent, file.absolute().parent.parent):
        run = RunFolder(folder)
        if run.config.is_file() and run.state.is_dir():
            return run
    return None


def embedding_needed(file: Path, metadata: Mapping[str, str] | None = None) -> str:
    """What a copy of a LoRA file lacks outside its run, in a sentence: the vectors of its trigger word; empty for most.

    By the run that it lies in, else by its `metadata`, of which nothing need be true.
    """
    run, told = run_of(file), metadata or {}
    found = sorted(run.embeddings.glob("*.safetensors")) if run else []
    if run and found:
        word = re.sub(r"-\d{8,}$", "", found[0].stem)
        step = re.search(r"-\d{8,}$", file.stem) if file.absolute().parent == run.checkpoints.absolute() else None
        own = run.embeddings / f"{word}{step[0] if step else ''}.safetensors"
        which = f"{word} of the run {run.path.name} ({(own if own in found else found[0]).name})"
    elif '"type": "pivotal"' in told.get("ss_network_args", "") and told.get("modelspec.trigger_phrase"):
        word = printable(told["modelspec.trigger_phrase"], 80)
        which = f"of {word} that was trained with it ({word}.safetensors, unless it was renamed)"
    else:
        return ""
    return f"{file.name} needs the embedding {which}, without which {word} is an ordinary word."


def is_of_step(file: Path) -> bool:
    """Whether a file's name ends with the step that it is of."""
    return re.search(r"-\d{8,}$", file.stem) is not None


def home_folder() -> Path:
    """Where runs and caches live when nobody says otherwise: $IMPASTO_HOME, else the user's data folder."""
    from platformdirs import user_data_path

    return Path(os.environ["IMPASTO_HOME"]) if os.environ.get("IMPASTO_HOME") else user_data_path("impasto", appauthor=False)


def absolute(path: Path) -> Path:
    """A path as typed, made absolute, ~ expanded. Unlike pathlib's own, it fails on no link loop and no unknown ~user."""
    return Path(os.path.abspath(os.path.expanduser(path)))


@dataclass(frozen=True)
class RunFolder:
    """Names inside a run folder. DESIGN: config.toml is written once; events.jsonl and trainer.log are only added to."""

    path: Path

    @property
    def config(self) -> Path:
        """Complete, resolved settings."""
        return self.path / "config.toml"

    @property
    def events(self) -> Path:
        """One JSON line for each event."""
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        """What the process said."""
        return self.path / "trainer.log"

    @property
    def manifest(self) -> Path:
        """Content hashes of all that went in."""
        return self.path / "manifest.json"

    @property
    def dataset(self) -> Path:
        """The version of the dataset that the window pinned for it, as trainers.dataset.versions writes it."""
        return self.path / "dataset.json"

    @property
    def proof(self) -> Path:
        """What reading the finished LoRA back has shown."""
        return self.path / "verification.json"

    @property
    def reserve(self) -> Path:
        """Room on the disk for the last words of a run that has filled it."""
        return self.path / ".reserve"

    @property
    def samples(self) -> Path:
        """Sample images."""
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        """Exported adapters along the way."""
        return self.path / "checkpoints"

    @property
    def embeddings(self) -> Path:
        """The trigger word's vectors, where it has some of its own: those of checkpoints and the finished ones."""
        return self.path / "embeddings"

    @property
    def state(self) -> Path:
        """Training states for resume."""
        return self.path / "state"

    @property
    def prior(self) -> Path:
        """Pictures drawn by the base for prior preservation."""
        return self.path / "prior"

    @property
    def result(self) -> Path | None:
        """The finished LoRA at the top level, once there is one."""
        found = sorted(self.path.glob("*.safetensors"))
        return found[0] if found else None

    @property
    def embedding(self) -> Path | None:
        """The finished embedding, once there is one."""
        found = [path for path in self.embeddings.glob("*.safetensors") if not is_of_step(path) and not path.is_symlink()]
        return min(found, default=None)

    def stop_asked(self) -> Literal["stop", "pause"] | None:
        """Whether somebody put the file `stop` there; `pause` written inside asks for a pause."""
        try:
            return "pause" if "pause" in (self.path / "stop").read_text(errors="replace") else "stop"
        except OSError:  # not there, or, on Windows, still open in the program that writes it
            return None

    def take_flag(self, name: str) -> bool:
        """True once after somebody put the file `name` (sample-now, save-now, stop) there; it is removed."""
        try:
            (self.path / name).unlink()
        except OSError:
            return False
        return True

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder by an OS lock that dies with the process. Raises RunFolderError when another process has it."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            hint = "Wait for it, or ask it to end: `touch stop` in that folder."
            raise RunFolderError(
                f"Another process is training in this run folder{self._holder()}", where=str(self.path), hint=hint
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _holder(self) -> str:
        """Who that is, by its own last word on it."""
        from trainers import events

        told, _ = events.read_since(self.events)
        number = next((event.get("process") for event in reversed(told) if event["type"] == "started"), None)
        return f": process {number}" if number else ""

    def check_manifest(self, manifest: dict[str, Any], force: bool = False) -> list[str]:
        """Writes the manifest the first time; later compares. With `force` returns what has changed since, in words.

        Raises ChangedError naming it otherwise, or RunFolderError when the old manifest cannot be read.
        """
        text = json.dumps(manifest, indent=1, sort_keys=True)
        changed: list[str] = []
        before: dict[str, Any] = {}
        if self.manifest.exists():
            try:
                before = json.loads(self.manifest.read_text(encoding="utf-8"))
            except ValueError as error:
                hint = "Delete that file to go on without the comparison."
                raise RunFolderError("The list of what went into this run is damaged", str(self.manifest), hint) from error
            changed = differences(before, json.loads(text))
            if changed and not force:
                some = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if changed[5:] else "")
                hint = "Put it back, or go on all the same with `impasto resume --force`, or train into a new run folder."
                raise ChangedError(f"Since this run began, {some}", where=str(self.path), hint=hint)
        if changed or not self.manifest.exists():
            # What a resume does not look at any more, such as the file that the run started from, stays on record.
            kept = before | json.loads(text)
            write_atomically(self.manifest, json.dumps(kept, indent=1, sort_keys=True).encode())
        return changed


_KINDS = {
    "images": "the picture {}", "captions": "the caption of {}", "repeats": "the repeats of {}",
    "crops": "the crop of {}", "base": "the base's {}",
    "start_from": "the {} that it starts from", "configuration": "the configuration of the base's {}",
    "masks": "the mask of {}", "prior": "the picture {}", "prior_captions": "the caption of {}",
}  # fmt: skip


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two manifests, each as a clause; versions of programs may differ."""
    found = []
    for kind, name in _KINDS.items():
        old, new = before.get(kind, {}), now.get(kind, {})
        for key in sorted(old.keys() | new.keys()):
            if kind not in ("images", "masks", "crops", "prior", "base") and not (key in old and key in new):
                continue  # told as a picture; a resume does not look at the file that a run started from
            if old.get(key) != new.get(key):
                how = "is gone" if key not in new else "is new" if key not in old else "has changed"
                found.append(f"{name.format(key)} {how}")
    old, new = _flat(before.get("settings", {})), _flat(now.get("settings", {}))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            was, is_ = (repr(values[key]) if key in values else "its default" for values in (old, new))
            found.append(f"the setting {key} has changed from {was[:80]} to {is_[:80]}")
    return found


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted names -> values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}".rstrip("."): part for name, part in inner.items()}
    return flat


def new_run(path: Path) -> RunFolder:
    """Prepares an empty run folder. Raises RunFolderError when it already holds a run or is a file."""
    run = RunFolder(absolute(path))
    if run.config.exists():
        raise RunFolderError(
            "This folder already holds a run",
            where=str(path),
            hint=f"`impasto resume {path}` goes on with it; or choose another --output.",
        )
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"The run folder cannot be made: {error.strerror}", where=str(path), hint="Choose another."
        ) from error
    stray = run.result
    if stray:
        raise RunFolderError(f"This folder already holds {stray.name}", where=str(path), hint="Choose another --output.")
    return run


def open_run(path: Path) -> RunFolder:
    """An existing run. Raises RunFolderError when there is none."""
    run = RunFolder(absolute(path))
    if not run.config.is_file():
        raise RunFolderError("There is no run in this folder", where=str(path), hint="A run has a config.toml. Check the path.")
    return run


def follows() -> bool:
    """Whether this is one of several processes, and not the one that writes the files."""
    return place()[0] > 0


def await_run(path: Path, seconds: float = 3600) -> RunFolder:
    """The run that the first of several processes is preparing. Raises RunFolderError when it does not appear in time.

    That takes as long as looking through all pictures; when the first one fails meanwhile, the launcher ends this one.
    """
    end = time.monotonic() + seconds
    while not RunFolder(absolute(path)).config.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return open_run(path)
