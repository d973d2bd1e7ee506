"""stdin, stdout and stderr of a program that was perhaps started without one of them, as by `2>&-`."""

import os
import sys
from typing import BinaryIO

from protocol.errors import ConfigurationError


def stand_in_for_closed_streams() -> None:
    """What would be said on a closed stderr is lost, and no file or socket gets the number of a closed stream."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for as long as the process lives)


def stdin() -> BinaryIO:
    """Raises ConfigurationError where it is closed."""
    if sys.stdin is None:
        raise ConfigurationError("cannot read the input from stdin: it is closed, name a file")
    return sys.stdin.buffer


def stdout() -> BinaryIO:
    """Raises ConfigurationError where it is closed."""
    if sys.stdout is None:
        raise ConfigurationError("cannot write the results to stdout: it is closed, name a file with -o")
    return sys.stdout.buffer
