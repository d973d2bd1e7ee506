"""Raw lines: what every format of input becomes before anybody looks into it. A file of JSON lines already is that."""

from collections.abc import Iterator
from typing import BinaryIO

from protocol.errors import InvalidRequest

#: One line's JSON, or what is wrong with it where it cannot even be had as a line.
RawLine = bytes | InvalidRequest

#: A longer line is refused without being read whole: it is a file without line breaks more often than a prompt.
MAX_LINE_BYTES = 16 * 1024 * 1024


class DamagedContent(Exception):
    """A file whose content is not what its beginning or its end promised; Source says which file and where."""


def split_lines(file: BinaryIO) -> Iterator[RawLine]:
    """The file's lines; of one over MAX_LINE_BYTES only as much is held as shows that it is too long."""
    while raw := file.readline(MAX_LINE_BYTES + 1):
        is_whole = len(raw) <= MAX_LINE_BYTES
        yield raw if is_whole else too_long("line")
        while not is_whole and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE_BYTES + 1)
            is_whole = len(raw) <= MAX_LINE_BYTES


def too_long(what: str, hint: str = "") -> InvalidRequest:
    """For a line or a row."""
    return InvalidRequest("line_too_long", f"the {what} is over the limit of {MAX_LINE_BYTES} bytes{hint}")
