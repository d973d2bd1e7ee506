"""StateFolder: where a one-machine run keeps its ledger and logs; one run at a time, by a file lock."""

import errno
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from protocol.errors import ConfigurationError, StateLocked

#: Seconds a killed run's last processes may take to end; they hold its lock until they have.
_ORPHANS_END_S = 20.0
_POLL_S = 0.1


class StateFolder:
    """A context manager: holds the lock within. Creates the folder.

    Raises StateLocked while another run holds it, and ConfigurationError for a folder that cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock_fd = -1

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.path / 'ledger.db'}"

    @property
    def worker_log(self) -> Path:
        return self.path / "worker.log"

    @property
    def redis_log(self) -> Path:
        return self.path / "redis.log"

    @property
    def lock_fd(self) -> int:
        """For a process to keep open: whoever does keeps the folder locked."""
        assert self._lock_fd >= 0
        return self._lock_fd

    def __enter__(self) -> "StateFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._trouble(error) from error
        try:
            self._take_lock()
            os.ftruncate(self._lock_fd, 0)
            os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self._close()
            raise self._trouble(error) from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _trouble(self, error: OSError) -> ConfigurationError:
        make_room = "make room there, or " if error.errno == errno.ENOSPC else ""
        return ConfigurationError(
            f"the state folder {self.path} cannot be used ({error.strerror}): {make_room}choose another with "
            "--state DIR"
        )

    def _take_lock(self) -> None:
        deadline = time.monotonic() + _ORPHANS_END_S
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                holder = self._holder()
                if _is_alive(holder) or time.monotonic() > deadline:
                    raise StateLocked(
                        f"another run (process {holder}) holds the state folder {self.path}: wait until it ends, stop "
                        "it, or give this run a folder of its own with --state DIR"
                    ) from None
            except OSError as error:
                raise ConfigurationError(
                    f"the state folder {self.path} cannot be locked ({error.strerror}): choose another with --state DIR"
                ) from error
            time.sleep(_POLL_S)

    def _holder(self) -> int | None:
        text = os.pread(self._lock_fd, 32, 0).strip()
        return int(text) if text.isdigit() else None

    def _close(self) -> None:
        # No LOCK_UN: it would unlock the folder for the processes that still hold this lock, too.
        os.close(self._lock_fd)
        self._lock_fd = -1


def _is_alive(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
