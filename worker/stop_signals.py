"""What signals ask of a worker: the first to stop in order; a second one, or SIGQUIT, to give everything back at once.

A notice that the machine will be taken away is such a signal like any other.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

from celery.worker import state

#: Whether whoever started this process has it outlive its terminal, as nohup does. Asked before Celery's own handler is
#: there, which would start the worker again.
_OUTLIVES_TERMINAL = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def heed_stop_signals(hurry: Callable[[], None]) -> None:
    """In place of Celery's handlers, which would have tasks end that are Chunks with leases. Main thread only."""

    def on_signal(number: int, _frame: Any) -> None:
        if state.should_stop is not None or number == signal.SIGQUIT:
            hurry()
        state.should_stop = os.EX_OK

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, on_signal)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if _OUTLIVES_TERMINAL else on_signal)
