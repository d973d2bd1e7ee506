"""Group commit: Results of many Chunks land in one transaction, each fenced by its Chunk's lease."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import msgspec

from protocol.backoff import backoff
from protocol.errors import DatabaseUnavailable
from protocol.faults import fault_point
from protocol.requests import Answer, Result
from storage.answers import AnswerCache
from storage.jobs import close_job_if_done
from storage.landing_channel import LandingChannel
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit
from worker.open_chunk import OpenChunk

logger = logging.getLogger("millrace.worker")
T = TypeVar("T")

#: Rows per transaction at most, and how long the first of them may wait for company: a commit costs a disk flush.
_MAX_ROWS = 2048
_MAX_DELAY_S = 0.05
#: Pauses between tries while the database is away.
_RETRY_S, _MAX_RETRY_S = 0.1, 5.0


class _Row(msgspec.Struct, frozen=True):
    chunk: OpenChunk | None  # None: the answer to a call, which is nobody's Result
    result: Result | None = None  # None of a Chunk: it owes nothing and only has to be marked finished
    key: bytes | None = None  # set with the answer that is new to the database
    answer: Answer | None = None


class Committer:
    """One thread. `on_finished` gets Chunks that are done, `on_lost` those whose lease went to another attempt."""

    def __init__(
        self,
        ledger: Ledger,
        cache: AnswerCache,
        landings: LandingChannel,
        *,
        on_committed: Callable[[Iterable[bytes]], None],
        on_finished: Callable[[OpenChunk], None],
        on_lost: Callable[[OpenChunk], None],
    ) -> None:
        self._ledger = ledger
        self._cache = cache
        self._landings = landings
        self._on_committed, self._on_finished, self._on_lost = on_committed, on_finished, on_lost
        self._rows: queue.SimpleQueue[_Row | None] = queue.SimpleQueue()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def backlog(self) -> int:
        """Rows not yet taken up."""
        return self._rows.qsize()

    def put(self, chunk: OpenChunk, result: Result, key: bytes | None = None) -> None:
        """`key` says that the Result's answer was computed just now and is to be kept."""
        self._rows.put(_Row(chunk, result, key, result.answer if key is not None else None))

    def keep(self, key: bytes, answer: Answer) -> None:
        """An answer that was computed for a call."""
        self._rows.put(_Row(None, key=key, answer=answer))

    def finish(self, chunk: OpenChunk) -> None:
        """A Chunk whose Results are all there already."""
        self._rows.put(_Row(chunk, None))

    def stop(self) -> None:
        """Commits what was put, then ends; an absent database is not waited for any longer."""
        self._is_stopping.set()
        self._rows.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            rows, is_last = self._gather()
            if rows:
                try:
                    self._commit(rows)
                except DatabaseUnavailable as error:
                    logger.error(
                        "the database is away (%s): %d results are left to be computed again", error, len(rows)
                    )
                except Exception:
                    # Whoever holds the lease next computes these rows; a dead committer would hold up all others.
                    logger.exception("a commit failed: its Chunks are given up until their leases expire")
                    self._on_committed([row.key for row in rows if row.key is not None])
                    for chunk in {row.chunk for row in rows if row.chunk is not None}:
                        self._on_lost(chunk)
            if is_last:
                return

    def _gather(self) -> tuple[list[_Row], bool]:
        first = self._rows.get()
        if first is None:
            return [], True
        rows, until = [first], time.monotonic() + _MAX_DELAY_S
        while len(rows) < _MAX_ROWS:
            try:
                row = self._rows.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if row is None:
                return rows, True
            rows.append(row)
        return rows, False

    def _commit(self, rows: list[_Row]) -> None:
        by_chunk: dict[OpenChunk, list[_Row]] = {}
        called: dict[bytes, Answer] = {}
        for row in rows:
            if row.chunk is not None:
                by_chunk.setdefault(row.chunk, []).append(row)
            elif row.key is not None and row.answer is not None:
                called[row.key] = row.answer
        commits: list[ChunkCommit] = []
        answers = dict(called)
        for chunk, chunk_rows in by_chunk.items():
            results = [row.result for row in chunk_rows if row.result is not None]
            for result in results:
                chunk.count(result)
            new = {row.key: row.answer for row in chunk_rows if row.key is not None and row.answer is not None}
            answers |= new
            commits.append(
                ChunkCommit(lease=chunk.lease, results=results, is_finished=chunk.num_owed == 0, answers=new)
            )
        fault_point("before commit")
        lost = self._write(commits, called)
        fault_point("committed")
        # The hot copy is filled before the keys stop being joinable: no moment in which an answer is nowhere.
        self._cache.put_many(answers)
        self._on_committed(answers)
        self._announce(commits, lost)
        finished = [chunk for chunk in by_chunk if chunk.num_owed == 0 and chunk.lease.chunk_id not in lost]
        for job_id in {chunk.lease.job_id for chunk in finished}:
            self._retry(partial(close_job_if_done, self._ledger, job_id))
        fault_point("job closed")
        for chunk in finished:
            self._on_finished(chunk)
        for chunk in by_chunk:
            if chunk.lease.chunk_id in lost:
                self._on_lost(chunk)

    def _announce(self, commits: list[ChunkCommit], lost: set[int]) -> None:
        landed: dict[str, list[int]] = {}
        for each in commits:
            if each.lease.chunk_id not in lost:
                landed.setdefault(each.lease.job_id, []).append(each.lease.chunk_id)
        self._landings.publish(landed)

    def _write(self, commits: list[ChunkCommit], answers: dict[bytes, Answer]) -> set[int]:
        return self._retry(lambda: commit(self._ledger, commits, answers))

    def _retry(self, act: Callable[[], T]) -> T:
        """Until it works, or until the worker stops: results are kept in memory while the database is away."""
        pauses = backoff(_RETRY_S, _MAX_RETRY_S)
        while True:
            try:
                return act()
            except DatabaseUnavailable as error:
                if self._is_stopping.is_set():
                    raise
                logger.warning("the database is away, trying again: %s", error)
                self._is_stopping.wait(next(pauses))
