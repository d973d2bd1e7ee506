"""ReplacedFile: a file that appears whole at the end or, after an error, not at all."""

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from protocol.errors import ConfigurationError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}


class ReplacedFile:
    """A context manager that gives the file to write to; what was there under `path` before is replaced at its end.

    Creates the folder. A pipe or a device is written to directly. Raises ConfigurationError when the file cannot be
    written, as far as that can be known on entering, and when it cannot be completed.
    """

    def __init__(self, path: Path) -> None:
        # A link stays a link: its target is what is replaced.
        self._path = Path(os.path.realpath(path))
        self._temporary: Path | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> BinaryIO:
        try:
            if self._path.is_dir():
                raise ConfigurationError(f"cannot write the results to {self._path}: it is a folder, name a file in it")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and not stat.S_ISREG(self._path.stat().st_mode):
                self._file = self._path.open("wb")  # a pipe or a device cannot be replaced
                return self._file
            # Beside the target, since a rename works only within one file system.
            handle, name = tempfile.mkstemp(prefix=f".{self._path.name}.", suffix=".tmp", dir=self._path.parent)
            self._temporary, self._file = Path(name), os.fdopen(handle, "wb")
            self._temporary.chmod(0o666 & ~_umask())
        except OSError as error:
            raise self.trouble(error) from error
        return self._file

    def check(self) -> None:
        """Raises ConfigurationError when the file could not be written: to be asked before hours of work."""
        if not self._path.exists() or self._path.is_dir() or self._path.is_file():
            self.__enter__()
            self._discard()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if error is None:
                self._complete(self._file)
        except OSError as trouble:
            raise self.trouble(trouble) from trouble
        finally:
            self._discard()

    def trouble(self, error: OSError) -> ConfigurationError:
        """The error to raise for one that came from writing."""
        reason, way_out = error.strerror or str(error), "name another file"
        if error.errno in _NO_ROOM:
            way_out = "make room there or name another file; all Results are kept"
        elif error.errno in _NO_PERMISSION:
            way_out = "name a file where you may write"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            in_the_way = next((path for path in self._path.parents if path.exists() and not path.is_dir()), None)
            reason = reason if in_the_way is None else f"{in_the_way} is a file, not a folder"
        return ConfigurationError(f"cannot write the results to {self._path}: {reason}: {way_out}")

    def _discard(self) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):
            self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None

    def _complete(self, file: BinaryIO) -> None:
        file.flush()
        if self._temporary is None:
            return
        os.fsync(file.fileno())
        os.replace(self._temporary, self._path)
        self._temporary = None
        # The rename itself is on disk only when the folder is.
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    # It can only be read by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
