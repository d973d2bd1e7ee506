"""OpenAI's batch output read back, an object for each line, as bytes to compare with those it should be."""

from collections.abc import Iterator
from typing import BinaryIO

import msgspec

from producer.written_results import WrittenRow
from protocol.errors import ConfigurationError


class _Body(msgspec.Struct):
    model: str | None = None


class _Response(msgspec.Struct):
    body: _Body


class _Object(msgspec.Struct):
    id: str
    response: _Response


_decode = msgspec.json.Decoder(_Object).decode


def is_batch_object(row: bytes) -> bool:
    try:
        _decode(row)
    except msgspec.DecodeError:
        return False
    return True


def shown_models(rows: BinaryIO) -> Iterator[str | None]:
    """How each object calls the model, which is up to whoever wrote the file; errors do not name it. Raises as
    `written_objects`."""
    for row in rows:
        yield _read(row).response.body.model


def written_objects(rows: BinaryIO, job_id: str) -> Iterator[WrittenRow]:
    """As `written_rows`. Raises ConfigurationError for what is none of this Job's objects, and what reading raises."""
    prefix = f"batch_req-{job_id}-"
    for row in rows:
        name = _read(row).id
        line = name.removeprefix(prefix)
        if line == name or not (line.isascii() and line.isdecimal()):
            raise ConfigurationError(f"its id is {name!r}, which is none of the Job {job_id}")
        yield WrittenRow(int(line), 0, row.rstrip(b"\r\n"))


def _read(row: bytes) -> _Object:
    try:
        return _decode(row)
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"it is no object of OpenAI's batch output ({error})") from error
