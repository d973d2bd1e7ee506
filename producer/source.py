"""Source: what a Job is made of, as lines of JSON, whatever form the caller has it in."""

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from producer.identity import file_digest, lines_digest
from producer.lines import encode_item, split_lines
from protocol.errors import ConfigurationError

#: A path, an open binary file, or items: a string is a prompt, a mapping what a line of a JSONL file would hold.
Input = str | Path | BinaryIO | Iterable[str | Mapping[str, Any]]


class Source:
    """A path or a list can be read twice, once for its digest and once for its lines; anything else only once."""

    def __init__(self, given: Input) -> None:
        self._path = Path(given) if isinstance(given, str | Path) else None
        self._file = cast(BinaryIO, given) if hasattr(given, "readline") else None
        self._items: Iterable[bytes] = []
        self._seen: tuple[int, int] | None = None
        self._digest: str | None = None
        if self._path is None and self._file is None:
            items = (encode_item(item) for item in cast(Iterable[str | Mapping[str, Any]], given))
            self._items = list(items) if isinstance(given, list | tuple) else items

    def digest(self) -> str:
        """SHA-256 of the content. Raises ConfigurationError for what can be read only once, or not at all."""
        if self._digest is None:
            self._digest = self._read_digest()
        return self._digest

    def check(self) -> None:
        """Raises ConfigurationError for a path that cannot be read, without reading it."""
        if self._path is None:
            return
        self._status(self._path)
        if not os.access(self._path, os.R_OK):
            raise ConfigurationError(f"cannot read the input {self._path}: {os.strerror(errno.EACCES)}")

    @contextmanager
    def lines(self) -> Iterator[Iterator[bytes]]:
        """The lines, until the end of the context. Raises ConfigurationError when a file cannot be read or changes."""
        if self._path is None:
            yield iter(self._items) if self._file is None else split_lines(self._file)
            return
        try:
            file = self._path.open("rb")
        except OSError as error:
            raise ConfigurationError(f"cannot read the input {self._path}: {error.strerror}") from error
        with file:
            yield split_lines(file)
        status = self._status(self._path)
        if self._seen is not None and self._seen != (status.st_size, status.st_mtime_ns):
            raise ConfigurationError(
                f"the input {self._path} was changed while it was read: submit it again once it is complete"
            )

    def _read_digest(self) -> str:
        if isinstance(self._items, list) and self._path is None and self._file is None:
            return lines_digest(self._items)
        if self._path is not None:
            status = self._status(self._path)
            if stat.S_ISREG(status.st_mode):
                self._seen = (status.st_size, status.st_mtime_ns)
                return file_digest(self._path)
        raise ConfigurationError(
            "an input that can be read only once needs a name, under which it can be resumed: --job NAME, or name= in "
            "Python"
        )

    def _status(self, path: Path) -> os.stat_result:
        try:
            status = path.stat()
        except OSError as error:
            raise ConfigurationError(f"cannot read the input {path}: {error.strerror}") from error
        if stat.S_ISDIR(status.st_mode):
            raise ConfigurationError(f"cannot read the input {path}: it is a folder, name a file in it")
        return status
