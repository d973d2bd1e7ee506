"""Files of Results read back, a row at a time, each as bytes to compare with those of the Result that it should be.

Knows the flat format in every kind of file that it is written to, and no ledger; OpenAI's is written_batch.py's.
"""

import csv
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import msgspec

from producer.file_format import FileKind
from producer.parquet_rows import import_pyarrow
from producer.result_line import encode_result
from producer.result_table import COLUMNS, csv_cells, to_row
from protocol.errors import ConfigurationError
from protocol.requests import Result

#: Of a Parquet file, read at a time.
_BATCH_ROWS = 1024

_NAMES = list(COLUMNS)


class WrittenRow(msgspec.Struct, frozen=True):
    """One Result of a file; `content` equals `content_of` the same Result for that kind of file."""

    line: int
    sample: int
    content: bytes


class _Key(msgspec.Struct):
    line: int
    sample: int


_decode_key = msgspec.json.Decoder(_Key).decode
_encode = msgspec.json.Encoder().encode


def content_of(result: Result, kind: FileKind) -> bytes:
    """What `written_rows` yields for it from a file of this kind."""
    if kind == "jsonl":
        return encode_result(result).rstrip(b"\n")
    return _encode(csv_cells(result) if kind == "csv" else to_row(result))


def written_rows(file: BinaryIO, kind: FileKind) -> Iterator[WrittenRow]:
    """The file's rows, decompressed. Raises ConfigurationError for what is no Result, and what reading raises."""
    return _READERS[kind](file)


def _from_jsonl(file: BinaryIO) -> Iterator[WrittenRow]:
    for row in file:
        try:
            key = _decode_key(row)
        except msgspec.DecodeError as error:
            raise ConfigurationError(
                f"it is no Result, neither in the flat format nor in OpenAI's ({error})"
            ) from error
        yield WrittenRow(key.line, key.sample, row.rstrip(b"\r\n"))


def _from_csv(file: BinaryIO) -> Iterator[WrittenRow]:
    csv.field_size_limit(sys.maxsize)  # of the module; a Result may be longer than its own limit
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            rows = csv.reader(text, strict=True)
            _check_names(next(rows, []))
            for row in rows:
                yield _row(row, row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigurationError(f"it is not well-formed CSV: {error}") from error


def _from_parquet(file: BinaryIO) -> Iterator[WrittenRow]:
    arrow = import_pyarrow()
    try:
        with arrow.parquet.ParquetFile(file) as parquet:
            _check_names(parquet.schema_arrow.names)
            for batch in parquet.iter_batches(_BATCH_ROWS, use_threads=False):
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    yield _row(row, list(row))
    except arrow.ArrowException as error:
        raise ConfigurationError("it is no whole Parquet file") from error


_READERS: dict[FileKind, Callable[[BinaryIO], Iterator[WrittenRow]]] = {
    "jsonl": _from_jsonl,
    "csv": _from_csv,
    "parquet": _from_parquet,
}


def _check_names(names: list[str]) -> None:
    if names != _NAMES:
        raise ConfigurationError(f"its columns are not those of Results, {', '.join(_NAMES)}")


def _row(cells: Any, content: Any) -> WrittenRow:
    try:
        return WrittenRow(int(cells[0]), int(cells[1]), _encode(content))
    except (ValueError, TypeError, IndexError) as error:
        raise ConfigurationError("it begins with no numbers of a line and a sample") from error
