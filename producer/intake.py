"""Intake: takes lines into a Job, a Chunk in each transaction, and rings for each. Holds a Chunk of them at most."""

import logging
from collections.abc import Callable, Sequence

from producer.chunk_cutter import cut_chunks
from producer.doorbell import Doorbell
from producer.identity import given_name
from producer.job_watch import JobWatch
from producer.lines import LineReader
from producer.pauses import Pauses
from producer.source import Source
from producer.wakeups import Wakeup, Wakeups
from protocol.errors import ConfigurationError, DatabaseUnavailable, SubmissionConflict
from protocol.faults import fault_point
from protocol.requests import Request, Result
from protocol.settings import Settings
from storage.jobs import Job, append_chunk, intake_position, seal_job
from storage.landings import num_unfinished_requests
from storage.ledger import Ledger

logger = logging.getLogger("millrace.producer")


class Intake:
    """Of one source. With a `window`, no more than so many of the Job's Requests are unfinished at any time.

    A Chunk's count as unfinished until all of them are done.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        doorbell: Doorbell,
        wakeups: Wakeups,
        watch: JobWatch,
        *,
        window: int | None,
        wakeup: Wakeup | None,
    ) -> None:
        if window is not None and window < 1:
            raise ConfigurationError(f"window={window} is out of range: it must be 1 or more, or None for no bound")
        self._ledger = ledger
        self._doorbell = doorbell
        self._wakeups = wakeups
        self._watch = watch
        self._window = window
        self._wakeup = wakeup or Wakeup()
        self._limits = (min(settings.chunk_requests, window or settings.chunk_requests), settings.chunk_bytes)
        self._room = 0
        self._has_stored = False

    def run(
        self, job: Job, content: Source, model_names: Sequence[str], on_progress: Callable[[int], None] | None
    ) -> None:
        """Take in what is not in yet, and seal the Job.

        Raises what reading the source does, SubmissionConflict, WaitStopped, and DatabaseUnavailable unless the
        database has taken lines in this very call.
        """
        position = intake_position(self._ledger, job.id)
        with content.lines() as lines:
            reader = LineReader(lines, model_names, skip=position)
            cuts = cut_chunks(reader, position, *self._limits)
            for requests, failures in cuts:
                self._wait_for_room(job, len(requests))
                last_line = max(items[-1].line for items in (requests, failures) if items)
                chunk_id = self._append(job, position + 1, last_line, requests, failures)
                position = last_line
                self._room -= len(requests)
                fault_point("appended")
                if chunk_id is not None:
                    self._doorbell.ring(chunk_id, job.model, job.priority)
                if on_progress is not None:
                    on_progress(position)
                self._wakeup.check()
        if reader.num_lines < position:
            raise SubmissionConflict(
                f"the Job {given_name(job) or job.id!r} already has {position} lines, but this input has "
                f"{reader.num_lines}: it is another one, so give it a name of its own"
            )
        fault_point("all appended")
        seal_job(self._ledger, job.id, reader.num_lines)

    def _append(
        self, job: Job, first_line: int, last_line: int, requests: list[Request], failures: list[Result]
    ) -> int | None:
        """As append_chunk; but a database that has taken lines before, and now is full or away, is waited for."""
        pauses: Pauses | None = None
        while True:
            try:
                chunk_id = append_chunk(
                    self._ledger,
                    job.id,
                    first_line=first_line,
                    last_line=last_line,
                    requests=requests,
                    failures=failures,
                    may_be_in=pauses is not None,
                )
            except DatabaseUnavailable as error:
                if not self._has_stored:
                    raise
                if pauses is None:
                    pauses = Pauses(self._wakeup)
                    logger.warning("%s; %d lines are in, and it goes on when the database does", error, first_line - 1)
                pauses.pause("the database took no more lines")
                continue
            if pauses is not None:
                logger.warning("the database takes lines again: going on after line %d", last_line)
            self._has_stored = True
            return chunk_id

    def _wait_for_room(self, job: Job, num_requests: int) -> None:
        """Until so many more fit into the window; only as much of the source has been read."""
        if self._window is None or self._room >= num_requests:
            return
        with self._wakeups.listen(job.id, self._wakeup):
            pauses, is_away = Pauses(self._wakeup), False
            while True:
                try:
                    self._room = self._window - pauses.timed(lambda: self._num_unfinished(job))
                except DatabaseUnavailable as error:
                    if not self._has_stored:
                        raise
                    if not is_away:
                        logger.warning("%s; it goes on when the database does", error)
                    is_away = True
                if self._room >= num_requests:
                    return
                pauses.pause(f"the Job {job.id} got no room for more")

    def _num_unfinished(self, job: Job) -> int:
        # What is late ends here, where all workers have died or none is of this model.
        self._watch.end_overdue(job.id)
        return num_unfinished_requests(self._ledger, job.id)
