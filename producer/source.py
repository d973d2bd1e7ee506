"""Source: what a Job is made of, as raw lines, whatever form the caller has it in."""

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from producer.columns import ALL_DEFAULTS, Columns
from producer.compression import DAMAGES, decompressed
from producer.csv_rows import CsvRows
from producer.file_format import FileFormat, format_of
from producer.identity import file_digest, lines_digest, reading_digest
from producer.lines import encode_item
from producer.parquet_rows import ParquetRows, seekable
from producer.raw_lines import DamagedContent, RawLine, split_lines
from protocol.errors import ConfigurationError, DamagedInput

#: A path, an open binary file, or items: a string is a prompt, a mapping what a line of a JSONL file would hold.
Input = str | Path | BinaryIO | Iterable[str | Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Reading:
    """How an input is read. `file_format` is by default what a path's suffixes say, and JSON lines for an open file;
    `columns` are those of a CSV or Parquet file. `model_map` has the names of models that lines may ask for besides the
    served one's, each with the served one's, which is the one to answer them."""

    file_format: FileFormat | None = None
    columns: Columns = ALL_DEFAULTS
    model_map: Mapping[str, str] = field(default_factory=dict)


AS_NAMED = Reading()


class Source:
    """A path or a list can be read twice, once for its digest and once for its lines; anything else only once.

    Raises ConfigurationError when columns are named of a format that has none.
    """

    def __init__(self, given: Input, reading: Reading = AS_NAMED) -> None:
        self._path = Path(given) if isinstance(given, str | Path) else None
        self._file = cast(BinaryIO, given) if hasattr(given, "readline") else None
        self._items: Iterable[bytes] = []
        self._seen: tuple[int, int] | None = None
        self._digest: str | None = None
        self._columns = reading.columns
        self._model_map = reading.model_map
        if self._path is None and self._file is None:
            items = (encode_item(item) for item in cast(Iterable[str | Mapping[str, Any]], given))
            self._items = list(items) if isinstance(given, list | tuple) else items
        self._format = reading.file_format or (FileFormat() if self._path is None else format_of(self._path.name))
        if self._format.kind == "jsonl" and reading.columns != ALL_DEFAULTS:
            raise ConfigurationError(
                f"{self} is read as JSON lines, which have no columns and say what they ask for: --prompt-column, "
                "--id-column and --kind are for CSV and Parquet, which --input-format or the file's suffix asks for"
            )

    def __str__(self) -> str:
        return "the input" if self._path is None else f"the input {self._path}"

    def model_names(self, served: Sequence[str]) -> Sequence[str]:
        """What lines may ask for: the served model's names, and what is mapped to one of them.

        Raises ConfigurationError for what is mapped to another model.
        """
        for asked, answers in self._model_map.items():
            if answers not in served:
                raise ConfigurationError(
                    f"{asked!r} is mapped to the model {answers!r}, but the one that is served is {served[0]!r}: map "
                    "it to that"
                )
        return (*served, *self._model_map)

    def digest(self) -> str:
        """SHA-256 of the content and of how it is read. Raises ConfigurationError for what can be read only once, or
        not at all."""
        if self._digest is None:
            self._digest = self._read_digest()
        return self._digest

    def check(self) -> None:
        """Raises ConfigurationError for a path that cannot be read or lacks a wanted column, DamagedInput for one that
        is broken at its beginning; reads no more than that."""
        if self._path is None:
            return
        status = self._status(self._path)
        if not os.access(self._path, os.R_OK):
            raise ConfigurationError(f"cannot read {self}: {os.strerror(errno.EACCES)}")
        if stat.S_ISREG(status.st_mode) and self._format != FileFormat():
            try:
                with self._path.open("rb") as file:
                    next(self._read(file), None)
            except DamagedInput as error:
                raise DamagedInput(f"{error}: write it anew, or say with --input-format what it is") from error

    @contextmanager
    def lines(self) -> Iterator[Iterator[RawLine]]:
        """The lines, until the end of the context.

        Raises ConfigurationError when a file cannot be read, DamagedInput where it breaks off or is corrupt, and at its
        end when it was changed meanwhile.
        """
        if self._path is None:
            yield iter(self._items) if self._file is None else self._read(self._file)
            return
        try:
            file = self._path.open("rb")
        except OSError as error:
            raise ConfigurationError(f"cannot read {self}: {error.strerror}") from error
        with file:
            yield self._read(file)
        status = self._status(self._path)
        if self._seen is not None and self._seen != (status.st_size, status.st_mtime_ns):
            was, size = self._seen[0], status.st_size
            how = f"{was:,} bytes have become {size:,}" if was != size else f"it still has {size:,} bytes"
            raise DamagedInput(f"{self} was changed while it was read: {how}")

    def _read(self, file: BinaryIO) -> Iterator[RawLine]:
        number = 0
        try:
            for line in self._lines_of(file):
                yield line
                number += 1
        except ConfigurationError as error:
            raise ConfigurationError(f"cannot read {self}: {error}") from error
        except (*DAMAGES, DamagedContent) as error:
            what = "breaks off" if isinstance(error, EOFError) else "is damaged"
            known = self._format.compression or self._format.kind
            raise DamagedInput(f"{self} {what} {_after(number)}{_position(file)}, as {known} is read") from error
        except OSError as error:
            raise ConfigurationError(f"cannot read {self} {_after(number)}: {error.strerror}") from error

    def _lines_of(self, file: BinaryIO) -> Iterator[RawLine]:
        if self._format.kind == "parquet":
            with seekable(file) as whole:
                yield from ParquetRows(whole, self._columns)
            return
        content = decompressed(file, self._format.compression)
        yield from CsvRows(content, self._columns) if self._format.kind == "csv" else split_lines(content)

    def _read_digest(self) -> str:
        if isinstance(self._items, list) and self._path is None and self._file is None:
            return reading_digest(lines_digest(self._items), self._format, self._columns, self._model_map)
        if self._path is not None:
            status = self._status(self._path)
            if stat.S_ISREG(status.st_mode):
                self._seen = (status.st_size, status.st_mtime_ns)
                return reading_digest(file_digest(self._path), self._format, self._columns, self._model_map)
        raise ConfigurationError(
            "an input that can be read only once needs a name, under which it can be resumed: --job NAME, or name= in "
            "Python"
        )

    def _status(self, path: Path) -> os.stat_result:
        try:
            status = path.stat()
        except OSError as error:
            raise ConfigurationError(f"cannot read {self}: {error.strerror}") from error
        if stat.S_ISDIR(status.st_mode):
            raise ConfigurationError(f"cannot read {self}: it is a folder, name a file in it")
        return status


def _after(number: int) -> str:
    return f"after line {number}" if number else "in its first line"


def _position(file: BinaryIO) -> str:
    try:
        return f", at byte {file.tell()} of the file"
    except OSError:  # a pipe has no position
        return ""
