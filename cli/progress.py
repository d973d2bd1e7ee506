"""Progress: a Job's way to its end on stderr; a live line on a terminal, plain lines every few seconds elsewhere."""

import logging
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable

import click

from storage.jobs import JobStatus

#: Seconds between two plain lines.
_PLAIN_INTERVAL_S = 5.0
#: Seconds over which speed is taken: results come a batch at a time.
_WINDOW_S = 15.0
_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """A context manager; messages of our loggers go through it, so that they do not tear the live line."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._is_live = sys.stderr.isatty()
        self._is_line_open = False
        self._last_plain = self._start = clock()
        self._is_loading: bool | None = None
        self._seen: deque[tuple[float, int, int]] = deque()  # time, results, computed tokens
        self._handler = _Handler(self)

    def __enter__(self) -> "Progress":
        logging.getLogger("millrace").addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("millrace").removeHandler(self._handler)
        self._clear()

    def show(self, status: JobStatus, *, is_loading: bool | None = None) -> None:
        """Take in where the Job is, and print it if it is time.

        `is_loading` says whether its worker is still busy starting; None when that is not known from here.
        """
        now = self._clock()
        self._is_loading = is_loading
        self._seen.append((now, status.num_ok + status.num_error, status.computed_tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW_S:
            self._seen.popleft()
        if self._is_live:
            # A line that wraps could not be cleared again.
            width = shutil.get_terminal_size().columns - 1
            click.echo(_CLEAR_LINE + self._line(status)[:width], nl=False, err=True)
            self._is_line_open = True
        elif now - self._last_plain >= _PLAIN_INTERVAL_S:
            self._last_plain = now
            click.echo(self._line(status), err=True)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._clear()
        click.echo(text, err=True)

    def _line(self, status: JobStatus) -> str:
        (then, results_then, tokens_then), (now, results, tokens) = self._seen[0], self._seen[-1]
        # Samples asked for line by line are not known beforehand.
        total = max(status.num_lines * (status.job.params.n or 1), results)
        parts = [f"{results:,}/{total:,}{'+' if status.job.state == 'submitting' else ''} results"]
        if results_then == results and not tokens:
            parts.append(self._stage(status))
        elapsed = now - then
        if elapsed > 0 and results > results_then:
            parts.append(f"{(tokens - tokens_then) / elapsed:,.0f} tokens/s")
        if status.num_cached:
            parts.append(f"{status.num_cached:,} known")
        if status.num_error:
            parts.append(f"{status.num_error:,} error{'s' * (status.num_error != 1)}")
        if elapsed > 0 and results > results_then and status.job.state != "submitting":
            parts.append(f"{clock_time((total - results) * elapsed / (results - results_then))} left")
        return ", ".join(parts)

    def _stage(self, status: JobStatus) -> str:
        """What is known while no Result tells."""
        if status.num_requests_leased:
            return "running"  # only a worker that is ready claims anything
        if self._is_loading is None:
            return "waiting for a worker"
        return "the model is being loaded" if self._is_loading else "the worker is ready"

    def _clear(self) -> None:
        if self._is_line_open:
            click.echo(_CLEAR_LINE, nl=False, err=True)
            self._is_line_open = False


class _Handler(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.say(f"{record.levelname.lower()}: {record.getMessage()}")


def clock_time(seconds: float) -> str:
    """As minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
