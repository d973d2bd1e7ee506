"""Output: where a command writes Results: a file that appears whole at the end, or stdout, at once."""

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cli.standard_streams import stdout
from protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from producer.job_results import Order
    from producer.results_file import ResultFormat, ResultsFile, ResultShape
    from protocol.requests import Result
    from storage.jobs import Job

STDIN = STDOUT = "-"


@dataclass(frozen=True, slots=True)
class Showing:
    """How Results are written: `errors` is the place for those that failed, None: beside the others."""

    result_format: "ResultFormat" = "flat"
    order: "Order" = "input"
    errors: str | None = None

    def takes_stdout(self, output: str | None) -> bool:
        """Whether Results go there, so that nothing else may."""
        return STDOUT in (output, self.errors)


class Output:
    """A context manager over one or two places. `model` is how the Job's model is called, its own name by default."""

    def __init__(self, output: str, showing: Showing, job: "Job", model: str | None = None) -> None:
        from producer.results_file import ResultShape

        self._shape = ResultShape(showing.result_format, job, model)
        self._is_in_order = showing.order == "input"
        self._results = _place(output, self._shape)
        self._errors = self._results if showing.errors is None else _place(showing.errors, self._shape)
        self._stack = ExitStack()

    def __enter__(self) -> "Output":
        with ExitStack() as stack:
            for place in dict.fromkeys((self._results, self._errors)):
                stack.enter_context(place)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def write(self, results: "Iterable[Result]", on_result: "Callable[[Result], None] | None" = None) -> None:
        """Each of them as soon as it can be. Raises ConfigurationError when that fails, as on a full disk."""
        for piece in self._shape.pieces(results, is_in_order=self._is_in_order):
            has_failed = any(result.failure is not None for result in piece)
            (self._errors if has_failed else self._results).write(*piece)
            for result in piece if on_result is not None else ():
                assert on_result is not None
                on_result(result)


def shown_output(output: str, showing: Showing | None = None) -> str:
    """How messages name it."""
    shown = "stdout" if output == STDOUT else output
    if showing is None or showing.errors is None:
        return shown
    return f"{shown}, errors to {shown_output(showing.errors)}"


def check_output(output: str, input_path: str, showing: Showing) -> None:
    """Raises ConfigurationError for an output that is the input or could not be written: before hours of work."""
    from producer.results_file import ResultsFile, ResultShape

    if showing.errors is not None and _is_same(output, showing.errors):
        raise ConfigurationError(f"results and errors both go to {shown_output(output)}: give one of them another name")
    for place in (output, showing.errors):
        if place is None:
            continue
        if place == STDOUT:
            stdout()
            continue
        if place.endswith(os.sep):
            raise ConfigurationError(f"cannot write the results to {place}: it is a folder, name a file in it")
        if input_path != STDIN and _is_same(place, input_path):
            raise ConfigurationError(f"the output {place} is the input itself: give it another name")
        ResultsFile(Path(place), ResultShape(showing.result_format)).check()


def _is_same(one: str, two: str) -> bool:
    if STDOUT in (one, two):
        return one == two
    if os.path.realpath(one) == os.path.realpath(two):
        return True
    return os.path.exists(one) and os.path.exists(two) and os.path.samefile(one, two)


def _place(output: str, shape: "ResultShape") -> "ResultsFile | StdoutResults":
    from producer.results_file import ResultsFile

    return StdoutResults(shape) if output == STDOUT else ResultsFile(Path(output), shape)


class StdoutResults:
    """JSON lines; each Result is out when `write` returns."""

    def __init__(self, shape: "ResultShape") -> None:
        from producer.file_format import FileFormat

        self._file = stdout()
        self._writer = shape.writer(self._file, FileFormat())

    def __enter__(self) -> "StdoutResults":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def write(self, *results: "Result") -> None:
        """Raises ConfigurationError when it cannot be written, and BrokenPipeError when nobody reads any more."""
        try:
            self._writer.write(results)
            self._file.flush()
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            # What is left in the buffer would fail again when the interpreter ends, then with a traceback.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)
            raise ConfigurationError(f"cannot write the results to stdout: {error.strerror}") from error
