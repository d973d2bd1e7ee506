"""LiveLine: one line on stderr that says how far something is: rewritten on a terminal, else printed now and then."""

import logging
import shutil
import sys
import time
from collections.abc import Callable

import click

#: Seconds between two plain lines.
_PLAIN_INTERVAL_S = 5.0
_CLEAR_LINE = "\r\x1b[K"


class LiveLine:
    """A context manager; messages of our loggers go through it, so that they do not tear the line."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._is_live = sys.stderr.isatty()
        self._is_open = False
        self._last_plain = clock()
        self._handler = _Handler(self)

    def __enter__(self) -> "LiveLine":
        logging.getLogger("millrace").addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("millrace").removeHandler(self._handler)
        self.clear()

    def show(self, text: Callable[[], str]) -> None:
        """Print what `text` returns if it is time."""
        if self._is_live:
            # A line that wraps could not be cleared again.
            width = shutil.get_terminal_size().columns - 1
            click.echo(_CLEAR_LINE + text()[:width], nl=False, err=True)
            self._is_open = True
        elif self._clock() - self._last_plain >= _PLAIN_INTERVAL_S:
            self._last_plain = self._clock()
            click.echo(text(), err=True)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self.clear()
        click.echo(text, err=True)

    def clear(self) -> None:
        """Take the live line away, before something else is printed."""
        if self._is_open:
            click.echo(_CLEAR_LINE, nl=False, err=True)
            self._is_open = False


class _Handler(logging.Handler):
    def __init__(self, line: LiveLine) -> None:
        super().__init__(logging.WARNING)
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self._line.say(f"{record.levelname.lower()}: {record.getMessage()}")
