"""ResultsFile: a Job's Results in a file, in the format its name asks for; all of them or no file."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Protocol

from producer.batch_result import encode_batch_result
from producer.compression import compressed
from producer.file_format import FileFormat, format_of
from producer.line_results import whole_lines
from producer.parquet_rows import import_pyarrow
from producer.replaced_file import ReplacedFile
from producer.result_line import encode_result
from producer.result_table import CsvResults, ParquetResults
from protocol.errors import ConfigurationError
from protocol.requests import Result
from storage.jobs import Job

#: `flat` is an object or a row for each sample, `openai` one object for each line.
ResultFormat = Literal["flat", "openai"]


class ResultWriter(Protocol):
    """Writes Results in one format; what `close` has not been called on is not complete."""

    def write(self, results: Sequence[Result]) -> None: ...

    def close(self) -> None: ...


class FlatResults:
    """An object for each sample."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, results: Sequence[Result]) -> None:
        self._file.write(b"".join(map(encode_result, results)))

    def close(self) -> None:
        pass


class BatchResults:
    """OpenAI's object for each line: what is written at a time are all of its Results."""

    def __init__(self, file: BinaryIO, job: Job, model: str) -> None:
        self._file = file
        self._job = job
        self._model = model

    def write(self, results: Sequence[Result]) -> None:
        self._file.write(encode_batch_result(results, self._job, self._model))

    def close(self) -> None:
        pass


class ResultShape:
    """How Results are shown; OpenAI's objects name the Job and the model, by its own name by default."""

    def __init__(self, result_format: ResultFormat = "flat", job: Job | None = None, model: str | None = None) -> None:
        self._format = result_format
        self._job = job
        self._model = model

    def check(self, file_format: FileFormat) -> None:
        """Raises ConfigurationError for a kind of file that cannot have this shape."""
        if self._format == "openai" and file_format.kind != "jsonl":
            raise ConfigurationError(
                f"OpenAI's format is JSON lines, not {file_format.kind}: name the file .jsonl, or take --format flat"
            )

    def writer(self, file: BinaryIO, file_format: FileFormat) -> ResultWriter:
        """For a file of this format. Raises ConfigurationError when it does not fit or needs what is not installed."""
        self.check(file_format)
        if file_format.kind == "csv":
            return CsvResults(file)
        if file_format.kind == "parquet":
            return ParquetResults(file)
        if self._format == "flat":
            return FlatResults(file)
        assert self._job is not None, "OpenAI's format needs the Job"
        return BatchResults(file, self._job, self._model or self._job.model)

    def pieces(self, results: Iterable[Result], *, is_in_order: bool) -> Iterator[list[Result]]:
        """What is written at a time: each Result, or those of a line together."""
        if self._format == "flat":
            return ([result] for result in results)
        return whole_lines(results, is_in_order=is_in_order)


FLAT = ResultShape()


class ResultsFile:
    """A context manager: what is written within appears under `path` at once at the end, or, after an error, not.

    The name's suffixes choose JSON lines, CSV or Parquet, and gzip or zstd for the first two. Creates the folder.
    Raises ConfigurationError when the file cannot be written, as far as that can be known on entering.
    """

    def __init__(self, path: Path, shape: ResultShape = FLAT) -> None:
        self._target = ReplacedFile(path)
        self._shape = shape
        self._format = format_of(path.name)
        self._stack = ExitStack()
        self._writer: ResultWriter | None = None

    def __enter__(self) -> "ResultsFile":
        with ExitStack() as stack:
            file = stack.enter_context(compressed(stack.enter_context(self._target), self._format.compression))
            self._writer = self._shape.writer(file, self._format)
            self._stack = stack.pop_all()
        return self

    def check(self) -> None:
        """Raises ConfigurationError when the file could not be written: to be asked before hours of work."""
        self._shape.check(self._format)
        if self._format.kind == "parquet":
            import_pyarrow()
        self._target.check()

    def write(self, *results: Result) -> None:
        """Add Results, of the format openai all of a line's. Raises ConfigurationError when they cannot be written, as
        on a full disk."""
        assert self._writer is not None
        try:
            self._writer.write(results)
        except OSError as error:
            raise self._target.trouble(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._writer is not None
        if error is not None:
            with contextlib.suppress(Exception):
                self._writer.close()  # a writer that is left open would do that when it is collected
            self._stack.__exit__(kind, error, traceback)
            return
        try:
            with self._stack:
                self._writer.close()
        except OSError as trouble:
            raise self._target.trouble(trouble) from trouble
