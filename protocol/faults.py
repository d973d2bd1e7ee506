"""Fault points: named places in the life of a Chunk, from its making on, where a test has the process die. Nothing is
armed without MILLRACE_FAULT, and then each of them costs one comparison.

MILLRACE_FAULT is `kill:NAME:COUNT` (or `stop:...`): at the COUNT-th time that a process comes to the point NAME it gets
SIGKILL (SIGSTOP). With `:FILE` behind it only if that file is there, which it removes first: one death, whoever is
started again.
"""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

FAULT_VARIABLE = "MILLRACE_FAULT"


class _Fault:
    def __init__(self, text: str) -> None:
        action, self.name, count, *file = text.split(":", 3)
        self._signal = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[action]
        self._left = int(count)
        self._file = Path(file[0]) if file else None

    def reached(self) -> None:
        self._left -= 1
        if self._left:
            return
        if self._file is not None:
            try:
                self._file.unlink()
            except FileNotFoundError:
                return
        os.kill(os.getpid(), self._signal)


def _armed(environ: Mapping[str, str]) -> _Fault | None:
    return _Fault(environ[FAULT_VARIABLE]) if environ.get(FAULT_VARIABLE) else None


_fault = _armed(os.environ)


def fault_point(name: str, *values: int) -> None:
    """The process may end here, if a test wants it to. `values` are for the name's placeholders."""
    if _fault is not None and _fault.name == name % values:
        _fault.reached()
