"""Output: where a command writes Results: a file that appears whole at the end, or stdout, at once."""

import errno
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from producer.results_file import ResultsFile
    from protocol.requests import Result

STDIN = STDOUT = "-"


def open_output(output: str) -> "ResultsFile | StdoutResults":
    """A context manager with `write`; `-` is stdout."""
    from producer.results_file import ResultsFile

    return StdoutResults() if output == STDOUT else ResultsFile(Path(output))


def shown_output(output: str) -> str:
    """How messages name it."""
    return "stdout" if output == STDOUT else output


def check_output(output: str, input_path: str) -> None:
    """Raises ConfigurationError for an output that is the input or could not be written: before hours of work."""
    from producer.results_file import ResultsFile

    if output == STDOUT:
        return
    both_exist = input_path != STDIN and os.path.exists(input_path) and os.path.exists(output)
    if both_exist and os.path.samefile(input_path, output):
        raise ConfigurationError(f"the output {output} is the input itself: give it another name")
    ResultsFile(Path(output)).check()


class StdoutResults:
    """Each Result is out when `write` returns."""

    def __enter__(self) -> "StdoutResults":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def write(self, result: "Result") -> None:
        """Raises ConfigurationError when it cannot be written, and BrokenPipeError when nobody reads any more."""
        from producer.results_file import encode_result

        stdout = sys.stdout.buffer
        try:
            stdout.write(encode_result(result))
            stdout.flush()
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            # What is left in the buffer would fail again when the interpreter ends, then with a traceback.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stdout.fileno())
            os.close(nowhere)
            raise ConfigurationError(f"cannot write the results to stdout: {error.strerror}") from error
