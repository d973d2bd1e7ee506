"""Results as a table's rows, one for each sample: the flat format in CSV and Parquet.

The columns are the keys of ResultLine, with the parts of usage and error as columns of their own. What is an object
there is its JSON here; in Parquet an embedding is a list of numbers.
"""

import csv
from collections.abc import Sequence
from typing import Any, BinaryIO

import msgspec

from producer.parquet_rows import import_pyarrow
from producer.result_line import to_line
from protocol.pooling import show_embedding
from protocol.requests import Result

COLUMNS = {
    "line": "int64",
    "sample": "int32",
    "custom_id": "string",
    "text": "string",
    "finish_reason": "string",
    "prompt_tokens": "int32",
    "completion_tokens": "int32",
    "cached": "bool",
    "error_code": "string",
    "error_message": "string",
    "params": "string",
    "logprobs": "string",
    "score": "string",
    "classification": "string",
    "embedding": "embedding",
    "user": "string",
    "metadata": "string",
    "store": "bool",
}
#: Rows in memory until they are written, and bytes, about, at which they are written earlier.
_GROUP_ROWS = 10_000
_GROUP_BYTES = 64 << 20
_FLOAT_BYTES = 32  # of Python's, in a list

_encode = msgspec.json.Encoder().encode


def to_row(result: Result) -> list[Any]:
    """In the order of COLUMNS; the embedding is a list of numbers, whatever was asked for."""
    line, answer = to_line(result), result.answer
    usage = (None, None) if line.usage is None else (line.usage.prompt_tokens, line.usage.completion_tokens)
    error = (None, None) if line.error is None else (line.error.code, line.error.message)
    return [
        *(line.line, line.sample, line.custom_id, line.text, line.finish_reason, *usage, line.cached, *error),
        *map(_as_json, (line.params, line.logprobs, line.score, line.classification)),
        None if answer is None or answer.embedding is None else show_embedding(answer.embedding, "float"),
        None if line.user is msgspec.UNSET else line.user,
        _as_json(line.metadata),
        None if line.store is msgspec.UNSET else line.store,
    ]


def _as_json(value: Any) -> str | None:
    return None if value is None or value is msgspec.UNSET else _encode(value).decode()


class CsvResults:
    """Quoted as needed, with one row of names above; in UTF-8, lines ended by a line feed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rows = _RowsOfText()
        # What is quoted are the characters of this end, and to readers a return alone ends a row as well.
        self._writer = csv.writer(self._rows, lineterminator=_RowsOfText.END)
        self._writer.writerow(COLUMNS)

    def write(self, results: Sequence[Result]) -> None:
        self._writer.writerows(map(csv_cells, results))
        self._file.write(self._rows.take())

    def close(self) -> None:
        self._file.write(self._rows.take())


class _RowsOfText:
    """What csv's writer writes to, a row at a time, each ended by END."""

    END = "\r\n"

    def __init__(self) -> None:
        self._rows: list[str] = []

    def write(self, row: str) -> None:
        self._rows.append(row.removesuffix(self.END))

    def take(self) -> bytes:
        """All since the last call, each ended by a line feed."""
        rows, self._rows = self._rows, []
        return "".join(f"{row}\n" for row in rows).encode()


def csv_cells(result: Result) -> list[str]:
    """The row as CSV has it, before anything is quoted."""
    return [_cell(value) for value in to_row(result)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return _encode(value).decode() if isinstance(value, bool | list) else str(value)


class ParquetResults:
    """Row groups of some thousand rows, compressed with zstd. Needs pyarrow."""

    def __init__(self, file: BinaryIO) -> None:
        self._arrow = arrow = import_pyarrow()
        types = {"bool": arrow.bool_(), "embedding": arrow.list_(arrow.float32())}
        self._schema = arrow.schema([(n, types.get(t) or getattr(arrow, t)()) for n, t in COLUMNS.items()])
        self._writer = arrow.parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[list[Any]] = []
        self._num_bytes = 0

    def write(self, results: Sequence[Result]) -> None:
        for result in results:
            row = to_row(result)
            self._rows.append(row)
            self._num_bytes += sum(len(value) for value in row if isinstance(value, str))
            self._num_bytes += sum(len(value) * _FLOAT_BYTES for value in row if isinstance(value, list))
        if len(self._rows) >= _GROUP_ROWS or self._num_bytes >= _GROUP_BYTES:
            self._write_group()

    def close(self) -> None:
        if self._rows:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [self._arrow.array(c, t) for c, t in zip(columns, self._schema.types, strict=True)]
        self._writer.write_batch(self._arrow.record_batch(arrays, schema=self._schema))
        self._rows, self._num_bytes = [], 0
