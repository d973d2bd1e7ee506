"""The life of Chunks in this worker: leased, prepared, computed, committed, given back.

One thread takes Chunks in, from queue messages or straight from SQL, as long as there is token credit; one renews the
leases; the committer and the engine link have their own.
"""

import itertools
import logging
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from protocol.backoff import backoff
from protocol.errors import DatabaseUnavailable
from protocol.faults import fault_point
from protocol.priority import PRIORITIES
from protocol.requests import Answer, Failure
from protocol.settings import Settings
from storage.answers import AnswerCache
from storage.flights import Flights
from storage.landing_channel import LandingChannel
from storage.leases import Lease, claim_next, release, renew, still_leased
from storage.ledger import Ledger
from storage.overdue import end_overdue
from storage.takeover import Takeover
from worker.committer import Committer
from worker.inference import ENGINE_MODULE, Inference
from worker.open_chunk import OpenChunk, Ticket
from worker.preparation import failed

logger = logging.getLogger("millrace.worker")

#: How often an idle worker looks for Chunks in SQL, and any worker for overdue ones; and how old an unclaimed Chunk
#: must be before it is taken from there: its message may still be on the way.
_IDLE_CLAIM_INTERVAL_S = 1.0
_IDLE_CLAIM_AGE_S = 2.0
_RETRY_S = 1.0
_MAX_RETRY_S = 10.0
#: How often a worker that is to stop looks whether everything is finished.
_DRAIN_LOOK_S = 0.05
#: How often cancelled Jobs are looked for among what runs.
_WATCH_INTERVAL_S = 0.5
#: Rows waiting to be committed at which nothing more is taken in: known answers pass no engine that would slow them.
_MAX_BACKLOG = 8192


class ChunkService:
    """`on_credit` is called from any thread when `has_credit` may have changed; `on_fatal` when work cannot go on."""

    def __init__(
        self,
        settings: Settings,
        model_folder: Path,
        *,
        on_credit: Callable[[], None],
        on_fatal: Callable[[str], None],
        engine_module: str = ENGINE_MODULE,
    ) -> None:
        self.settings = settings
        self._ledger = Ledger(settings.database_url)
        self._cache = AnswerCache.connect(settings.broker_url, settings.answers_ttl_seconds, settings.answers_max_bytes)
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._on_credit = on_credit
        self._flights = Flights.connect(settings.broker_url, self.owner)
        self._committer = Committer(
            self._ledger,
            self._cache,
            LandingChannel.connect(settings.broker_url),
            on_committed=self._committed,
            on_finished=self._finish,
            on_lost=self._drop,
        )
        self.inference = Inference(
            settings,
            self._ledger,
            self._cache,
            self._flights,
            model_folder,
            on_room=self._room_changed,
            on_fatal=on_fatal,
            engine_module=engine_module,
        )
        self._tickets: queue.PriorityQueue[tuple[int, int, Ticket]] = queue.PriorityQueue()
        self._arrivals = itertools.count()
        self._open: dict[int, OpenChunk] = {}
        self._open_lock = threading.Lock()
        self._is_draining = threading.Event()  # nothing more is taken in
        self._is_hurried = threading.Event()
        self._is_stopping = threading.Event()
        self._has_room = threading.Event()
        self._on_fatal = on_fatal
        self._takeover = Takeover(settings.lease_seconds)
        self._threads = [
            threading.Thread(target=self._guarded, args=(self._take_in,), name="intake", daemon=True),
            threading.Thread(target=self._guarded, args=(self._renew,), name="renewal", daemon=True),
            threading.Thread(target=self._guarded, args=(self._watch,), name="watch", daemon=True),
        ]

    def load(self) -> None:
        """Blocks until the engines are ready. Raises ConfigurationError, EngineDied or DatabaseUnavailable."""
        self._ledger.check_schema()
        self.inference.start()

    def start(self) -> None:
        """From here on Chunks are leased, so that whoever ends the process has to `stop` it."""
        self._flights.beat()
        self._committer.start()
        for thread in self._threads:
            thread.start()

    def stop(self, is_needed: Callable[[], bool] = lambda: False) -> None:
        """Finishes what ends within `drain_seconds`, gives the rest back, ends the engine.

        Chunks given back keep their Results. `is_needed` says whether others wait for the engine; `hurry` cuts all
        waiting short.
        """
        started, num_open = time.monotonic(), len(self._open)
        self._is_draining.set()
        self._has_room.set()
        self._drain(is_needed)
        self._is_stopping.set()
        for thread in self._threads:
            thread.join()
        self.inference.stop()
        self._committer.stop()
        with self._open_lock:
            left, self._open = self._open, {}
        held = {chunk.lease.chunk_id: chunk.lease.attempt for chunk in left.values()}
        if held:
            try:
                release(self._ledger, self.owner, held)
            except DatabaseUnavailable as error:
                logger.warning("%d leases are left to expire, the database is away: %s", len(held), error)
        for chunk in left.values():
            chunk.complete()
        logger.info(
            "stopped in %.1f s; of %d chunks %d were finished and %d given back",
            time.monotonic() - started, num_open, num_open - len(held), len(held),
        )  # fmt: skip
        self._flights.close()
        self._ledger.close()

    def hurry(self) -> None:
        """Whoever stops waits for nothing any more. Safe in a signal handler."""
        self._is_hurried.set()

    def _drain(self, is_needed: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.settings.drain_seconds
        while (self._open or is_needed()) and time.monotonic() < deadline and not self._is_hurried.is_set():
            self._is_stopping.wait(_DRAIN_LOOK_S)

    def has_credit(self, rank: int) -> bool:
        """Whether another Chunk of this class could start soon; if so, of the more urgent ones too."""
        return self._committer.backlog <= _MAX_BACKLOG and self.inference.has_room(rank)

    def receive(self, ticket: Ticket) -> None:
        """A chunk message has come in. Returns at once."""
        self._tickets.put((min(ticket.ranks), next(self._arrivals), ticket))
        self._has_room.set()

    def keep(self, key: bytes, answer: Answer) -> None:
        """An answer that was computed for a call, to be found by everybody."""
        self._committer.keep(key, answer)

    def info(self) -> dict[str, object]:
        """Facts for `inspect stats`."""
        return {**self.inference.info(), "open_chunks": len(self._open)}

    def _guarded(self, body: Callable[[], None]) -> None:
        """A dead thread must not leave a worker that looks alive and does nothing."""
        try:
            body()
        except Exception:
            logger.exception("the thread %s broke", threading.current_thread().name)
            self._on_fatal(f"the worker's thread {threading.current_thread().name} broke; see the traceback above")

    def _take_in(self) -> None:
        next_look, next_sweep, pauses = 0.0, 0.0, backoff(_RETRY_S, _MAX_RETRY_S)
        while not self._is_draining.is_set():
            ranks = [rank for rank in range(len(PRIORITIES)) if self.has_credit(rank)]
            ticket = self._next_ticket(ranks, next_look)
            if self._is_draining.is_set():
                return
            try:
                if time.monotonic() >= next_sweep and not end_overdue(
                    self._ledger, self.owner, takeover=self._takeover
                ):
                    next_sweep = time.monotonic() + _IDLE_CLAIM_INTERVAL_S
                if ticket is not None:
                    self._claim(ticket)
                elif ranks and time.monotonic() >= next_look and not self._claim_unasked(ranks):
                    next_look = time.monotonic() + _IDLE_CLAIM_INTERVAL_S
            except DatabaseUnavailable as error:
                logger.warning("the database is away, trying again: %s", error)
                self._takeover.away()
                if ticket is not None:
                    self.receive(ticket)
                self._is_draining.wait(next(pauses))
            else:
                pauses = backoff(_RETRY_S, _MAX_RETRY_S)

    def _next_ticket(self, ranks: list[int], next_look: float) -> Ticket | None:
        """The most urgent one, if it is for one of these classes; waits a moment for one where there is none."""
        self._has_room.clear()
        try:
            first = self._tickets.get_nowait()
        except queue.Empty:
            first = None
        if first is not None and set(first[2].ranks) & set(ranks):
            return first[2]
        if first is not None:
            self._tickets.put(first)
        until_look_s = next_look - time.monotonic() if ranks else _RETRY_S
        self._has_room.wait(min(max(until_look_s, 0.0), _IDLE_CLAIM_INTERVAL_S))
        return None

    def _claim(self, ticket: Ticket) -> None:
        lease = self._claim_next(ticket.ranks)
        ticket.accept()
        if lease is None:
            ticket.complete("nothing to do: finished, cancelled, or leased by another worker")
            return
        self._work(lease, ticket)

    def _claim_unasked(self, ranks: list[int]) -> bool:
        lease = self._claim_next(ranks, min_age_s=_IDLE_CLAIM_AGE_S)
        if lease is None:
            return False
        logger.info(
            "chunk %d of job %s taken from the ledger (attempt %d)", lease.chunk_id, lease.job_id, lease.attempt
        )
        self._work(lease, None)
        return True

    def _claim_next(self, ranks: Collection[int], min_age_s: float = 0.0) -> Lease | None:
        with self._open_lock:
            held = list(self._open)
        asked_at = self._takeover.now()
        lease = claim_next(
            self._ledger,
            self.settings.served_models,
            self.owner,
            self.settings.lease_seconds,
            ranks=ranks,
            min_age_s=min_age_s,
            held=held,
            may_take_over=lambda: self._takeover.is_fair(asked_at),
        )
        if lease is not None:
            fault_point("claimed")
        return lease

    def _work(self, lease: Lease, ticket: Ticket | None) -> None:
        fault_point("accepted")
        chunk = OpenChunk(lease, ticket, self._committer)
        with self._open_lock:
            earlier = self._open.get(lease.chunk_id)
        if earlier is not None:
            # Our own lease ran out unnoticed and we have just claimed it again: the old attempt is fenced off.
            self._drop(earlier)
        try:
            self._prepare(chunk, apart=False)
            fault_point("prepared")
        except Exception:
            # Our fault is tried once more, each Request by itself, so that the sound ones do not pay for it.
            logger.exception("chunk %d could not be prepared (attempt %d)", lease.chunk_id, lease.attempt)
            self._drop(chunk)
            self._retry_apart(lease)
        self._on_credit()

    def _prepare(self, chunk: OpenChunk, *, apart: bool) -> None:
        lease = chunk.lease
        with self._open_lock:
            self._open[lease.chunk_id] = chunk
        try:
            self.inference.preparation.run(chunk, lease.requests, lease.job_params, lease.done, apart=apart)
        except DatabaseUnavailable as error:
            logger.warning("chunk %d is given up until its lease expires: %s", lease.chunk_id, error)
            self._drop(chunk)

    def _retry_apart(self, lease: Lease) -> None:
        chunk = OpenChunk(lease, None, self._committer)
        try:
            self._prepare(chunk, apart=True)
        except Exception:
            logger.exception("chunk %d could not be prepared, nor any request of it alone", lease.chunk_id)
            self._drop(chunk)
            self._fail(lease)

    def _fail(self, lease: Lease) -> None:
        """What is left of the Chunk ends as errors, so that its Job can end."""
        chunk = OpenChunk(lease, None, self._committer)
        with self._open_lock:
            self._open[lease.chunk_id] = chunk
        failure = Failure("internal_error", "the worker failed at this twice; its log says why")
        chunk.expect(len(lease.requests))
        for request in lease.requests:
            sample = next(i for i in itertools.count() if (request.line, i) not in lease.done)
            chunk.settle(failed(request, failure, None, sample, chunk))

    def _committed(self, keys: Iterable[bytes]) -> None:
        self.inference.committed(keys)
        self._has_room.set()

    def _room_changed(self) -> None:
        self._has_room.set()
        self._on_credit()

    def _finish(self, chunk: OpenChunk) -> None:
        lease = chunk.lease
        self._forget(chunk)
        logger.info(
            "chunk %d of job %s: %s, %d known, %.2f s",
            lease.chunk_id, lease.job_id, chunk.outcome(), chunk.num_cached, chunk.seconds,
        )  # fmt: skip
        chunk.complete()
        fault_point("reported")

    def _drop(self, *chunks: OpenChunk) -> None:
        for chunk in chunks:
            logger.warning("chunk %d is no longer ours (attempt %d)", chunk.lease.chunk_id, chunk.lease.attempt)
            self._forget(chunk)
        self.inference.abandon(*chunks)
        for chunk in chunks:
            chunk.complete()

    def _forget(self, chunk: OpenChunk) -> None:
        with self._open_lock:
            if self._open.get(chunk.lease.chunk_id) is chunk:
                del self._open[chunk.lease.chunk_id]

    def _renew(self) -> None:
        """Three times in the length of a lease, and soon again where that fails: short failures must not lose it."""
        often_s = self.settings.lease_seconds / 3
        pause_s = often_s
        while not self._is_stopping.wait(pause_s):
            is_done = self._drop_lost(lambda held: renew(self._ledger, self.owner, held, self.settings.lease_seconds))
            pause_s = often_s if is_done else min(_RETRY_S, often_s)

    def _watch(self) -> None:
        """A cancelled Job's Sequences leave the engine within a moment."""
        while not self._is_stopping.wait(_WATCH_INTERVAL_S):
            self._flights.beat()
            self._look_after_followers()
            self._drop_lost(lambda held: still_leased(self._ledger, self.owner, held))

    def _look_after_followers(self) -> None:
        try:
            self.inference.look_after_followers()
        except DatabaseUnavailable as error:
            logger.warning("answers of other workers cannot be found, trying again: %s", error)

    def _drop_lost(self, ask: Callable[[dict[int, int]], set[int]]) -> bool:
        """False where the database does not say."""
        with self._open_lock:
            chunks = list(self._open.values())
        if not chunks:
            return True
        try:
            still = ask({chunk.lease.chunk_id: chunk.lease.attempt for chunk in chunks})
        except DatabaseUnavailable as error:
            logger.warning("leases could not be looked after, trying again: %s", error)
            return False
        # One that owes nothing any more is finished, or about to be.
        lost = [chunk for chunk in chunks if chunk.lease.chunk_id not in still and chunk.num_owed]
        if lost:
            self._drop(*lost)
        return True
