"""Collector: writes Results as they land, beside whatever the command does meanwhile."""

import threading
from collections.abc import Callable
from types import TracebackType

from cli.output import Output
from producer.client import Client
from protocol.requests import Result
from storage.jobs import Job


class Collector:
    """A context manager: its thread reads the Job's Results to their end, which leaving the context waits for.

    Leaving it by an error waits for nothing: the thread ends with the process. What went wrong in the thread is raised
    when the context is left.
    """

    def __init__(self, client: Client, job: Job, output: Output, on_result: Callable[[Result], None]) -> None:
        self._client = client
        self._job = job
        self._output = output
        self._on_result = on_result
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="millrace-collector", daemon=True)

    def __enter__(self) -> "Collector":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            return
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._output.write(self._client.results(self._job, order="finished"), self._on_result)
        except Exception as error:
            self._error = error
