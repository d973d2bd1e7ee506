"""JobWatch: waits for a Job, for its end and for its Results, by the ledger and the word that Redis carries."""

from collections.abc import Callable, Iterator, Set

from producer.job_results import FinishedOrder, InputOrder, Order
from producer.pauses import Pauses
from producer.wakeups import Wakeup, Wakeups
from protocol.errors import DatabaseUnavailable, JobNotFound
from protocol.requests import Result
from storage.jobs import JobStatus, close_job_if_done, job_status, settled_position
from storage.landings import job_progress
from storage.ledger import Ledger
from storage.overdue import end_overdue
from storage.takeover import Takeover

ENDED = ("finished", "cancelled")

#: Seconds between two calls of a progress callback at most.
_PROGRESS_S = 1.0
#: In whose name overdue Chunks end here.
_OVERDUE_OWNER = "a client"


class JobWatch:
    """Thread-safe. Whoever brings a Wakeup along can stop the waiting with it."""

    def __init__(self, ledger: Ledger, wakeups: Wakeups, lease_s: float) -> None:
        self._ledger = ledger
        self._wakeups = wakeups
        self._takeover = Takeover(lease_s)

    def until_ended(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[JobStatus], None] | None = None,
        wakeup: Wakeup | None = None,
    ) -> JobStatus:
        """Block until the Job is finished or cancelled. Raises JobNotFound, TimedOut and WaitStopped."""
        with self._wakeups.listen(job_id, wakeup) as wakeup:
            pauses = Pauses(wakeup, timeout_s=timeout_s, most_s=_PROGRESS_S)
            while True:
                status = pauses.timed(lambda: self.look(job_id))
                if on_progress is not None:
                    on_progress(status)
                if status.job.state in ENDED:
                    return status
                pauses.pause(f"the Job {job_id} did not end")

    def results(
        self, job_id: str, order: Order, *, timeout_s: float | None = None, wakeup: Wakeup | None = None
    ) -> Iterator[Result]:
        """The Job's Results until it has ended. Raises JobNotFound, TimedOut and WaitStopped."""
        in_order = self._in_input_order if order == "input" else self._in_finished_order
        with self._wakeups.listen(job_id, wakeup) as wakeup:
            yield from in_order(job_id, Pauses(wakeup, timeout_s=timeout_s))

    def stored(self, job_id: str, order: Order) -> Iterator[Result]:
        """The Results that are there now."""
        in_order = InputOrder if order == "input" else FinishedOrder
        return in_order(self._ledger, job_id).read(None)

    def _in_input_order(self, job_id: str, pauses: Pauses) -> Iterator[Result]:
        stored = InputOrder(self._ledger, job_id)
        while True:
            # In this order: a Job that has ended before the position was read has no Results beyond it.
            is_last = self._has_ended(job_id)
            settled = None if is_last else pauses.timed(lambda: settled_position(self._ledger, job_id))
            for result in stored.read(settled):
                yield result
                pauses.restart()
            if is_last:
                return
            pauses.pause(f"no Result of the Job {job_id} came")

    def _in_finished_order(self, job_id: str, pauses: Pauses) -> Iterator[Result]:
        stored = FinishedOrder(self._ledger, job_id)
        landed: Set[int] | None = None
        while True:
            is_last = self._has_ended(job_id)
            for result in stored.read(None if is_last else landed):
                yield result
                pauses.restart()
            if is_last:
                return
            landed = pauses.pause(f"no Result of the Job {job_id} came")

    def look(self, job_id: str) -> JobStatus:
        """How far the Job is; what is overdue in it and nobody works on ends here. Raises JobNotFound."""
        self.end_overdue(job_id)
        status = job_status(self._ledger, job_id)
        if status.job.state != "running" or status.num_chunks_finished < status.num_chunks:
            return status
        # The worker that committed the last Chunk may have died before it could close the Job.
        close_job_if_done(self._ledger, job_id)
        return job_status(self._ledger, job_id)

    def end_overdue(self, job_id: str) -> None:
        """What is late in the Job and nobody works on ends here; after an outage, once workers had the time to say that
        they do. Raises DatabaseUnavailable."""
        try:
            end_overdue(self._ledger, _OVERDUE_OWNER, job_id=job_id, takeover=self._takeover)
        except DatabaseUnavailable:
            self._takeover.away()
            raise

    def _has_ended(self, job_id: str) -> bool:
        self.end_overdue(job_id)
        progress = job_progress(self._ledger, job_id)
        if progress is None:
            raise JobNotFound(f"there is no Job {job_id!r}")
        state, has_open_chunks = progress
        if state == "running" and not has_open_chunks:
            return close_job_if_done(self._ledger, job_id) or self._has_ended(job_id)
        return state in ENDED
