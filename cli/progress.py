"""Progress: a Job's way to its end, as a live line."""

import time
from collections import deque
from collections.abc import Callable

from cli.counted import counted
from cli.live_line import LiveLine
from storage.jobs import JobStatus

#: Seconds over which speed is taken: results come a batch at a time.
_WINDOW_S = 15.0


class Progress(LiveLine):
    """A context manager, as a LiveLine is."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._is_loading: bool | None = None
        self._seen: deque[tuple[float, int, int]] = deque()  # time, results, computed tokens

    def __enter__(self) -> "Progress":
        super().__enter__()
        return self

    def show_status(self, status: JobStatus, *, is_loading: bool | None = None) -> None:
        """Take in where the Job is, and print it if it is time.

        `is_loading` says whether its worker is still busy starting; None when that is not known from here.
        """
        now = self._clock()
        self._is_loading = is_loading
        self._seen.append((now, status.num_ok + status.num_error, status.computed_tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW_S:
            self._seen.popleft()
        self.show(lambda: self._line(status))

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
            parts.append(counted(status.num_error, "error"))
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


def clock_time(seconds: float) -> str:
    """As minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
