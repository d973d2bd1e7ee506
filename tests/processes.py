"""Processes as a test sees them: who descends from whom, and whether they are gone. Linux only."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType


def descendants(pid: int) -> set[int]:
    """The processes below `pid`, itself left out."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything, so count from behind it: state, then the parent.
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = {pid}
    while True:
        below = {child for child, parent in parents.items() if parent in found} - found
        if not below:
            return found - {pid}
        found |= below


def command_line(pid: int) -> str:
    """Empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class Watched:
    """Processes by descriptors, which never come to mean others as numbers do."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._open: dict[int, int] = {}
        for pid in pids:
            try:
                self._open[os.pidfd_open(pid)] = pid
            except ProcessLookupError:
                continue

    def __enter__(self) -> "Watched":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in self._open:
            os.close(descriptor)

    def kill(self) -> None:
        for descriptor in self._open:
            # One that has ended and was collected meanwhile is as dead as it was to be made.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)

    def left_after(self, timeout_s: float) -> list[str]:
        """The command lines of those that have not ended by then; returns as soon as all have."""
        deadline = time.monotonic() + timeout_s
        running = set(self._open)
        while running:
            ended, _, _ = select.select(running, [], [], max(deadline - time.monotonic(), 0))
            if not ended:
                break
            running -= set(ended)
        return [f"{self._open[descriptor]} {command_line(self._open[descriptor])}" for descriptor in running]
