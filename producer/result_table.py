"""Results as a table's rows, one for each sample: the flat format in CSV and Parquet.

The columns are the keys of ResultLine, with the parts of usage and error as columns of their own. What is an object
there is its JSON here; in Parquet an embedding is a list of numbers.
"""

import csv
import io
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
#: Rows in memory until they are written, and characters of text at which they are written earlier.
_GROUP_ROWS = 10_000
_GROUP_CHARACTERS = 32 << 20

_encode = msgspec.json.Encoder().encode


def to_row(result: Result) -> dict[str, Any]:
    """By the names of COLUMNS; the embedding is a list of numbers, whatever was asked for."""
    line = to_line(result)
    row: dict[str, Any] = {name: getattr(line, name, None) for name in COLUMNS}
    if line.usage is not None:
        row |= {"prompt_tokens": line.usage.prompt_tokens, "completion_tokens": line.usage.completion_tokens}
    if line.error is not None:
        row |= {"error_code": line.error.code, "error_message": line.error.message}
    for name in ("params", "logprobs", "score", "classification", "metadata"):
        if row[name] is not None and row[name] is not msgspec.UNSET:
            row[name] = _encode(row[name]).decode()
    if result.answer is not None and result.answer.embedding is not None:
        row["embedding"] = show_embedding(result.answer.embedding, "float")
    return {name: None if value is msgspec.UNSET else value for name, value in row.items()}


class CsvResults:
    """Quoted as needed, with one row of names above; in UTF-8, lines ended by a line feed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._text = io.StringIO(newline="")
        self._writer = csv.DictWriter(self._text, list(COLUMNS), lineterminator="\n")
        self._writer.writeheader()

    def write(self, results: Sequence[Result]) -> None:
        for result in results:
            row = to_row(result)
            if row["embedding"] is not None:
                row["embedding"] = _encode(row["embedding"]).decode()
            self._writer.writerow({n: str(v).lower() if isinstance(v, bool) else v for n, v in row.items()})
        self._pass_on()

    def close(self) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        self._file.write(self._text.getvalue().encode())
        self._text.seek(0)
        self._text.truncate()


class ParquetResults:
    """Row groups of some thousand rows, compressed with zstd. Needs pyarrow."""

    def __init__(self, file: BinaryIO) -> None:
        self._arrow = arrow = import_pyarrow()
        types = {"bool": arrow.bool_(), "embedding": arrow.list_(arrow.float32())}
        self._schema = arrow.schema([(n, types.get(t) or getattr(arrow, t)()) for n, t in COLUMNS.items()])
        self._writer = arrow.parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._num_characters = 0

    def write(self, results: Sequence[Result]) -> None:
        for result in results:
            row = to_row(result)
            self._rows.append(row)
            self._num_characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(self._rows) >= _GROUP_ROWS or self._num_characters >= _GROUP_CHARACTERS:
            self._write_group()

    def close(self) -> None:
        if self._rows:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        columns = [[row[name] for row in self._rows] for name in COLUMNS]
        arrays = [self._arrow.array(c, self._schema.field(n).type) for n, c in zip(COLUMNS, columns, strict=True)]
        self._writer.write_batch(self._arrow.record_batch(arrays, schema=self._schema))
        self._rows, self._num_characters = [], 0
