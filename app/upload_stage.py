"""Where uploaded files wait until all have come: a hidden folder inside the target, checked file by file."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from PIL import Image
from pydantic import BaseModel

from app.upload_names import Arrived, CleanName, NameRefused, clean_name, is_litter
from trainers.dataset.captions import read_caption_file
from trainers.dataset.pictures import read_picture
from trainers.errors import DatasetError, TrainingError, sentence
from trainers.library import read_facts

_PREFIX = ".upload-"  # hidden, so that no scan of the folder meets what is not finished
_NO_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class UploadError(TrainingError):
    """The whole upload is refused and nothing of it kept; `status` is the HTTP status that says so."""

    def __init__(self, what: str, where: str = "", hint: str = "", *, status: int = 400) -> None:
        super().__init__(what, where, hint)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one request and one folder may hold. Sizes in bytes."""

    files: int = 2_000
    """Parts of one request."""
    folder_files: int = 20_000
    """Files in the folder afterwards; also in one zip."""
    request_bytes: int = 4 << 30
    picture_bytes: int = 256 << 20
    caption_bytes: int = 1 << 20
    unpacked_bytes: int = 8 << 30
    """All files of one zip, unpacked."""


DEFAULT_LIMITS = Limits()


class Received(BaseModel):
    """What became of an upload."""

    saved: list[str] = []
    """Where the files are, relative to the folder. The same file sent again is named, and stored once."""
    rejected: list[tuple[str, str]] = []
    """(name as it was sent, why it was not taken)."""
    ignored: int = 0
    """Hidden and system files, of which nobody wants to hear."""


def too_large(limits: Limits) -> UploadError:
    """The error of a request over its limit."""
    hint = "Drop fewer files at once, or type the folder's path instead."
    return UploadError(f"The upload is larger than {_size(limits.request_bytes)}", hint=hint, status=413)


def _size(count: int) -> str:
    """Bytes in words; never rounded to nothing."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 0.1):.1f} MB"


class Stage:
    """A hidden folder inside the target, where files wait until all have come. It is gone when the block ends."""

    def __init__(self, target: Path, limits: Limits, length: int, more: tuple[str, ...] = ()) -> None:
        self.limits = limits
        self._more = more
        self.target = target
        self.received = Received()
        self.arrived: list[Arrived] = []
        self.zips: list[tuple[str, Path]] = []
        self.needed = length
        """Bytes that the upload takes on the disk, as far as is known."""
        self._written = 0
        self._folder = target
        self._file: BinaryIO | None = None
        self._path = target
        self._given = ""
        self._name: CleanName | None = None
        self._room = 0
        self._count = 0
        self._unpacking = False

    def __enter__(self) -> Stage:
        """Raises UploadError when the request is too large for the limits or the disk, OSError when it cannot be written."""
        if self.needed > self.limits.request_bytes:
            raise too_large(self.limits)
        self.target.mkdir(parents=True, exist_ok=True)
        _sweep(self.target)
        self.need(0)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=self.target))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # what could not be flushed is thrown away anyway
            self._close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def need(self, more: int) -> None:
        """Raises OSError (no space) when the disk has no room for what is still to come and `more` bytes."""
        self.needed += more
        if shutil.disk_usage(self.target).free < (more or self.needed):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def told(self, error: OSError) -> UploadError:
        """A disk's error as a sentence."""
        if error.errno not in _NO_ROOM:
            what = f"The upload cannot be stored: {error.strerror or error}"
            return UploadError(what, hint="Check the permissions of the home folder.", status=500)
        try:
            free = f", {_size(shutil.disk_usage(self.target).free)} are free"
        except OSError:
            free = ""
        hint = "Make room and drop the files again; nothing of this upload was kept."
        # A sender that does not tell the length has sent so much by now.
        needs = _size(self.needed) if self.needed else f"more than {_size(self._written)}"
        return UploadError(f"The disk is full: this upload needs {needs}{free}", hint=hint, status=507)

    def begin(self, given: str) -> None:
        """A file starts. Raises UploadError for one too many, OSError."""
        self._count += not self._unpacking
        if self._count > self.limits.files:
            what = f"More than {self.limits.files} files in one request"
            raise UploadError(what, hint="Send them in several.", status=413)
        self._given = given
        self._name = None
        if is_litter(given):
            self.received.ignored += 1
            return
        is_zip = given.lower().endswith(".zip")
        try:
            if is_zip and self._unpacking:
                raise NameRefused("A zip inside a zip; unpack it first")
            self._name = None if is_zip else clean_name(given, self._more)
        except NameRefused as error:
            self.reject(given, str(error))
            return
        limits = self.limits
        of_file = limits.caption_bytes if self._name and self._name.is_caption else limits.picture_bytes
        self._room = limits.request_bytes if is_zip else of_file
        handle, path = tempfile.mkstemp(dir=self._folder)
        self._file, self._path = os.fdopen(handle, "wb"), Path(path)

    def write(self, data: bytes) -> None:
        """The next bytes; a file that grows over its limit is dropped. Raises OSError."""
        if self._file is None:
            return
        self._room -= len(data)
        if self._room < 0:
            limit = self.limits.caption_bytes if self._name and self._name.is_caption else self.limits.picture_bytes
            self.drop(f"It is larger than {_size(limit)}")
            return
        self._written += len(data)
        self._file.write(data)

    def end(self) -> None:
        """The file is complete: kept when it holds what its name says. Raises OSError."""
        if self._file is None:
            return
        self._close()
        if self._name is None:
            self.zips.append((self._given, self._path))
            return
        try:
            _check(self._path, self._name)
        except TrainingError as error:
            self.drop(sentence(error.what, hint=error.hint))
            return
        self.arrived.append(Arrived(self._given, self._name, self._path))

    def drop(self, why: str) -> None:
        """The file is given up."""
        self.reject(self._given, why)
        with contextlib.suppress(OSError):
            self._close()
        self._path.unlink(missing_ok=True)

    def unpack(self, given: str, path: Path) -> None:
        """Takes the files of a zip in. Raises OSError, also before unpacking when the disk has no room for it."""
        from app.upload_zip import ZipRefused, open_zip, unpack

        self._unpacking = True
        try:
            archive, size = open_zip(path, files=self.limits.folder_files, unpacked_bytes=self.limits.unpacked_bytes)
        except ZipRefused as error:
            self.reject(given, str(error))
            return
        with archive:
            self.need(size)
            for name, why in unpack(archive, self):
                self.reject(f"{given}/{name}", why)

    def reject(self, given: str, why: str) -> None:
        """Notes a file that is not taken."""
        # Names come from strangers' archives: shortened, and nothing in them can move a terminal's cursor.
        name = "".join(c if c.isprintable() else "?" for c in given)
        self.received.rejected.append((name if len(name) <= 200 else f"{name[:197]}...", why))

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _check(path: Path, name: CleanName) -> None:
    """Raises TrainingError when the file is not what can be read: headers, limits on pixels, PNG's checksums."""
    if name.tail.lower() == ".safetensors":
        read_facts(path)
        return
    if name.is_caption:
        read_caption_file(path)
        return
    read_picture(path, decode=False)
    try:
        with Image.open(path) as image:
            image.verify()  # reads on only where the format has checksums: decoding all takes minutes on a large drop
    except Exception as error:  # each of Pillow's parsers trips in its own way over damaged files
        raise DatasetError(f"The picture is damaged ({error or type(error).__name__})") from error


def _sweep(target: Path) -> None:
    """Removes what a killed process left."""
    import psutil

    for left in target.glob(f"{_PREFIX}*"):
        process = left.name.removeprefix(_PREFIX).split("-")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
