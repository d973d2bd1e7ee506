"""Interrupts: SIGINT, SIGTERM and SIGHUP as a KeyboardInterrupt that cannot get lost."""

import signal
from types import FrameType, TracebackType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """A context manager for the main thread.

    Python drops a KeyboardInterrupt that happens to be raised within a destructor or a callback of the garbage
    collector, so the signal is remembered as well, and `check` raises again what got lost.
    """

    def __init__(self) -> None:
        self._is_pending = False

    def __enter__(self) -> "Interrupts":
        handlers = {number: signal.getsignal(number) for number in _NUMBERS}
        # A shell that starts this in the background has it ignore Ctrl-C, which is then meant for others; nohup has
        # it outlive its terminal.
        self._before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was a signal; to be called every second or so."""
        if self._is_pending:
            raise KeyboardInterrupt

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self._is_pending = True
        raise KeyboardInterrupt
