"""Service: a process that is started again whenever it has ended, as a service manager does, and may be killed."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


class Service:
    def __init__(
        self, command: Sequence[str | Path], log: Path, environ: dict[str, str], user: str | None = None
    ) -> None:
        self._command, self._log, self._environ, self._user = [str(part) for part in command], log, environ, user
        self._process: subprocess.Popen[bytes] | None = None
        self._start_at: float | None = 0.0

    @property
    def is_up(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def tend(self) -> None:
        """Start it if it is its time."""
        if self._process is not None and self._process.poll() is not None and self._start_at is None:
            self._start_at = time.monotonic()
        if self._start_at is not None and time.monotonic() >= self._start_at:
            self._start_at = None
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environ,
                    user=self._user, group=self._user, cwd=self._log.parent, start_new_session=True,
                    preexec_fn=lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
                )  # fmt: skip

    def kill(self, marker: str | None = None, restart_s: float = 0.0) -> bool:
        """SIGKILL it with its children, or those below it with this in their command line; whether there was one.

        It is started again after `restart_s` seconds; what is below it is its own affair.
        """
        if self._process is None or self._process.poll() is not None:
            return False
        if marker is not None:
            found = self.below(marker)
            for pid in found:
                _kill(pid)
            return bool(found)
        below = descendants(self._process.pid)
        self._start_at = time.monotonic() + restart_s
        # A worker's engine sees its parent's death by itself; the servers' own children are killed with them.
        for pid in [self._process.pid, *(below if "worker" not in self._command else [])]:
            _kill(pid)
        self._process.wait()
        return True

    def below(self, marker: str) -> list[int]:
        """The processes below it that have this in their command line."""
        if self._process is None:
            return []
        return [pid for pid in descendants(self._process.pid) if marker in _command_line(pid)]


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, left = [], [pid]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
