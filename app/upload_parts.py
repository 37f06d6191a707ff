"""Takes a multipart body apart as it comes in, and hands each file on piece by piece. Nothing is kept in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from python_multipart.multipart import MultipartParser, parse_options_header

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks


class Sink(Protocol):
    """What files are handed to: `begin`, any number of `write`, then `end` or `drop`; one after the other."""

    def begin(self, given: str) -> None:
        """A file starts; `given` is its name as it was sent."""

    def write(self, data: bytes) -> None:
        """The next bytes of the file."""

    def end(self) -> None:
        """The file is complete."""

    def drop(self, why: str) -> None:
        """The file cannot be read to its end."""


class PartReader:
    """A streaming reader for one request. Fields that are no files are passed over."""

    def __init__(self, content_type: str, sink: Sink) -> None:
        """Raises ValueError when the content type is not multipart/form-data with a boundary."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise ValueError(content_type)
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        self.finished = False
        """Whether the closing boundary came: without it the body was cut off."""
        self._sink = sink
        self._in_file = False
        self._name = self._value = self._disposition = b""
        self._parser = MultipartParser(options[b"boundary"], callbacks)

    def feed(self, data: bytes) -> None:
        """Reads on. Raises python_multipart's FormParserError for what is no multipart body, and what the sink raises."""
        self._parser.write(data)

    def _begin_part(self) -> None:
        self._disposition = b""

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        given = options.get(b"filename", b"")  # empty for a file field in which nothing was chosen
        self._in_file = bool(given)
        if given:
            try:
                self._sink.begin(given.decode("utf-8"))
            except UnicodeDecodeError:
                self._sink.begin(given.decode("latin-1"))

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._sink.write(data[start:end])

    def _end_part(self) -> None:
        if self._in_file:
            self._sink.end()
        self._in_file = False

    def _end(self) -> None:
        self.finished = True
