"""ParquetRows: a Parquet file's rows as raw lines, some hundred at a time. Needs pyarrow."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import msgspec

from producer.columns import Columns
from producer.raw_lines import MAX_LINE_BYTES, DamagedContent, RawLine, too_long
from protocol.errors import ConfigurationError, InvalidRequest

#: Rows read at a time, and how many bytes of values these may be on average.
_BATCH_ROWS = 1024
_BATCH_BYTES = 32 << 20
#: Bytes of a column taken from the disk at a time: without it, a whole row group's.
_BUFFER_BYTES = 1 << 20

_encode = msgspec.json.Encoder().encode


def import_pyarrow() -> Any:
    """pyarrow with its parquet module. Raises ConfigurationError when it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigurationError("Parquet needs pyarrow: pip install '.[parquet]' in Millrace's folder") from error
    return pyarrow


class ParquetRows:
    """Iterates over the rows. Raises ConfigurationError for what is no Parquet file, lacks a wanted column, or has one
    of another type than text (for the id, numbers will do).

    `file` must be seekable, since such a file is read from its end.
    """

    def __init__(self, file: BinaryIO, columns: Columns) -> None:
        self._arrow = import_pyarrow()
        try:
            self._file = self._arrow.parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except (self._arrow.ArrowException, OSError) as error:
            version = self._arrow.__version__
            raise ConfigurationError(f"it is no whole Parquet file, as far as pyarrow {version} knows") from error
        schema = self._file.schema_arrow
        self._columns = columns
        prompt, custom_id = columns.find(schema.names)
        self._prompt, self._id = schema.names[prompt], None if custom_id is None else schema.names[custom_id]
        types = self._arrow.types
        self._check_type(schema, self._prompt, types.is_null, *self._text_types())
        if self._id is not None:
            self._check_type(schema, self._id, types.is_null, types.is_integer, *self._text_types())

    def __iter__(self) -> Iterator[RawLine]:
        names = list(dict.fromkeys(filter(None, [self._prompt, self._id])))
        try:
            for batch in self._file.iter_batches(self._batch_rows(), columns=names, use_threads=False):
                prompts = self._values(batch.column(self._prompt))
                ids = self._values(batch.column(self._id)) if self._id is not None else [None] * len(prompts)
                yield from map(self._line, prompts, ids)
        except (self._arrow.ArrowException, OSError) as error:
            raise DamagedContent from error

    def _line(self, prompt: bytes | None, custom_id: bytes | int | None) -> RawLine:
        if prompt is not None and len(prompt) > MAX_LINE_BYTES:
            return too_long("row")
        try:
            line = self._columns.line(None if prompt is None else prompt.decode())
            if custom_id is not None:
                line["custom_id"] = custom_id.decode() if isinstance(custom_id, bytes) else str(custom_id)
        except UnicodeDecodeError:
            return InvalidRequest("invalid_utf8", "the row is not valid UTF-8")
        return _encode(line)

    def _batch_rows(self) -> int:
        """So many that their prompts are not too much at once, where some rows are long."""
        metadata = self._file.metadata
        largest = 0.0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = map(group.column, range(group.num_columns))
            sizes = [c.total_uncompressed_size for c in columns if c.path_in_schema == self._prompt]
            largest = max(largest, sum(sizes) / max(group.num_rows, 1))
        return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(largest, 1))))

    def _values(self, column: Any) -> list[Any]:
        """Numbers, and texts as bytes: what is no valid UTF-8 is then refused row by row."""
        types = self._arrow.types
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if not (types.is_integer(column.type) or types.is_null(column.type)):
            column = column.cast(self._arrow.large_binary())
        values: list[Any] = column.to_pylist()
        return values

    def _text_types(self) -> tuple[Any, ...]:
        types = self._arrow.types
        plain = (types.is_string, types.is_large_string, types.is_string_view)
        return (
            *plain,
            lambda given: types.is_dictionary(given) and any(is_text(given.value_type) for is_text in plain),
        )

    def _check_type(self, schema: Any, name: str, *allowed: Any) -> None:
        given = schema.field(name).type
        if not any(is_allowed(given) for is_allowed in allowed):
            raise ConfigurationError(f"the column {name!r} is of type {given}: it must be text")


@contextmanager
def seekable(file: BinaryIO) -> Iterator[BinaryIO]:
    """The file, or a temporary copy of what comes through a pipe."""
    if file.seekable():
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy)
        copy.seek(0)
        yield copy
