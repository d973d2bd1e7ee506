"""CsvRows: a CSV file's rows as raw lines, one at a time.

The first row names the columns. Of each further one, whose number counts from 1, the prompt and the id are taken and
the rest is left. Fields may be quoted and hold line breaks; a row that is not well-formed is refused alone.
"""

import csv
from collections.abc import Iterator
from typing import BinaryIO

import msgspec

from producer.columns import Columns
from producer.raw_lines import MAX_LINE_BYTES, RawLine, too_long
from protocol.errors import ConfigurationError, InvalidRequest

_BOM = "\ufeff"
_encode = msgspec.json.Encoder().encode


class CsvRows:
    """Iterates over the rows. Raises ConfigurationError when the first one lacks a wanted column or cannot be read.

    An empty file has no rows.
    """

    def __init__(self, file: BinaryIO, columns: Columns) -> None:
        # A limit of the module's, for all readers: ours is on the row, and it is the smaller one.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
        self._columns = columns
        self._lines = _PhysicalLines(file)
        self._reader = csv.reader(self._lines, strict=True)
        try:
            names = next(self._reader, None)
        except (csv.Error, _RowTooLong) as error:
            raise ConfigurationError(f"the first row, which names the columns, cannot be read: {error}") from error
        self._names = [] if names is None else [name.removeprefix(_BOM) for name in names]
        self._prompt, self._id = columns.find(self._names) if names is not None else (0, None)

    def __iter__(self) -> Iterator[RawLine]:
        while True:
            self._lines.start_row()
            try:
                fields = next(self._reader)
            except StopIteration:
                return
            except _RowTooLong:
                self._lines.skip_row()
                yield too_long("row", ": is a quote in it never closed?")
            except csv.Error as error:
                yield InvalidRequest("invalid_csv", f"the row is not well-formed CSV: {error}")
            else:
                yield self._line(fields) if fields else b""

    def _line(self, fields: list[str]) -> RawLine:
        if len(fields) != len(self._names):
            return InvalidRequest(
                "invalid_csv",
                f"the row has {len(fields)} fields, but there are {len(self._names)} columns: quote what has commas",
            )
        line = self._columns.line(fields[self._prompt])
        if self._id is not None and fields[self._id]:
            line["custom_id"] = fields[self._id]
        try:
            return _encode(line)
        except UnicodeEncodeError:
            return InvalidRequest("invalid_utf8", "the row is not valid UTF-8: save the file as UTF-8")


class _RowTooLong(Exception):
    def __init__(self) -> None:
        super().__init__(f"it is over the limit of {MAX_LINE_BYTES} bytes")


class _PhysicalLines:
    """The file's lines as text, for csv's reader; a row may take several of them, and too long a one raises."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.start_row()

    def start_row(self) -> None:
        self._num_bytes = self._num_quotes = 0
        self._raw = b""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._read()
        if not self._raw:
            raise StopIteration
        if self._num_bytes > MAX_LINE_BYTES:
            raise _RowTooLong
        return self._raw.decode("utf-8", "surrogateescape")

    def skip_row(self) -> None:
        """Pass over the rest of a row that was too long: a line break within quotes does not end it."""
        while self._raw and not (self._raw.endswith(b"\n") and self._num_quotes % 2 == 0):
            self._read()

    def _read(self) -> None:
        self._raw = self._file.readline(MAX_LINE_BYTES + 1)
        self._num_bytes += len(self._raw)
        self._num_quotes += self._raw.count(b'"')
