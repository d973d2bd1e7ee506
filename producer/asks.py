"""Asks: single prompts whose callers wait, gathered into small Jobs and handed their Results as these land.

However many wait, there are two threads, one transaction and one message for all that came in a moment, and one look
at the ledger for all that is open. A lone prompt goes at once.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

import msgspec

from producer.doorbell import Doorbell
from producer.job_results import stored_results
from producer.wakeups import WaitStopped, Wakeup, Wakeups
from protocol.errors import DatabaseUnavailable, JobNotFound, MillraceError
from protocol.priority import ASKED_PRIORITY
from protocol.requests import Request, Result
from protocol.sampling import SamplingParams
from protocol.settings import Settings
from storage.jobs import open_asked_job
from storage.landings import landed_by_id
from storage.ledger import Ledger

logger = logging.getLogger("millrace.producer")

#: Requests of one Job at most.
_MAX_REQUESTS = 64
#: Seconds between two Jobs: what comes meanwhile goes together. Hardly felt beside a model, and a worker does not drown
#: in Chunks of one Request.
_INTERVAL_S = 0.02
#: Seconds between two looks at the ledger without word from Redis, and until the next after the database was away.
_POLL_S = 1.0

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class _Ask:
    request: Request
    params: SamplingParams
    future: "Future[Result]"


@dataclass(slots=True)
class _OpenJob:
    id: str
    waiting: dict[int, "Future[Result]"]  # by line
    num_seen: int = 0  # Results


class Asks:
    """Thread-safe. Starts its threads with the first prompt."""

    def __init__(self, settings: Settings, ledger: Ledger, doorbell: Doorbell, wakeups: Wakeups) -> None:
        self._settings = settings
        self._ledger = ledger
        self._doorbell = doorbell
        self._wakeups = wakeups
        self._asks: queue.SimpleQueue[_Ask | None] = queue.SimpleQueue()
        self._open: dict[int, _OpenJob] = {}  # by Chunk
        self._wakeup = Wakeup()
        self._lock = threading.Lock()
        self._is_closed = False
        self._threads: list[threading.Thread] = []

    def put(self, request: Request, params: SamplingParams) -> "Future[Result]":
        """The Result to come; its first sample's, where the model's defaults ask for several.

        The future raises DatabaseUnavailable when the prompt could not be stored, JobNotFound when somebody cancelled
        or deleted its Job, and CancelledError when this is closed.
        """
        ask = _Ask(request, params, Future())
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the client is closed")
            self._start()
            self._asks.put(ask)
        return ask.future

    def close(self) -> None:
        """End the threads. Prompts that are stored get their answers, for nobody to wait for."""
        with self._lock:
            self._is_closed = True
        self._asks.put(None)
        self._wakeup.stop()
        for thread in self._threads:
            thread.join()
        for job in self._open.values():
            _cancel(job.waiting.values())

    def _start(self) -> None:
        if not self._threads:
            for name, body in (("millrace-asks", self._take_in), ("millrace-answers", self._deliver)):
                self._threads.append(threading.Thread(target=body, name=name, daemon=True))
                self._threads[-1].start()

    def _take_in(self) -> None:
        while True:
            batch, is_last = self._gather()
            by_params: dict[bytes, list[_Ask]] = {}
            for ask in batch:
                by_params.setdefault(_encode(ask.params), []).append(ask)
            for asks in by_params.values():
                if is_last:
                    _cancel(ask.future for ask in asks)
                else:
                    self._store(asks)
            if is_last:
                return
            if len(batch) < _MAX_REQUESTS:
                time.sleep(_INTERVAL_S)

    def _gather(self) -> tuple[list[_Ask], bool]:
        batch: list[_Ask] = []
        try:
            while len(batch) < _MAX_REQUESTS:
                ask = self._asks.get(block=not batch)
                if ask is None:
                    return batch, True
                if not ask.future.cancelled():
                    batch.append(ask)
        except queue.Empty:
            pass
        return batch, False

    def _store(self, asks: Sequence[_Ask]) -> None:
        requests = [msgspec.structs.replace(ask.request, line=line) for line, ask in enumerate(asks, 1)]
        model, params = self._settings.served_model, asks[0].params
        try:
            job_id, chunk_id = open_asked_job(
                self._ledger, tenant=self._settings.tenant, model=model, params=params, requests=requests
            )
        except Exception as error:
            if not isinstance(error, MillraceError):
                logger.exception("prompts could not be stored")
            for ask in asks:
                _fail(ask.future, error)
            return
        waiting = {line: ask.future for line, ask in enumerate(asks, 1)}
        with self._lock:
            self._open[chunk_id] = _OpenJob(job_id, waiting)
        self._wakeups.add(job_id, self._wakeup)
        self._wakeup.ring(set())  # whoever delivers may have been waiting for nothing in particular
        try:
            self._doorbell.ring(chunk_id, model, ASKED_PRIORITY)
        except MillraceError as error:
            for ask in asks:
                _fail(ask.future, error)

    def _deliver(self) -> None:
        is_away = False
        try:
            while True:
                with self._lock:
                    is_idle = not self._open
                landed = self._wakeup.wait(threading.TIMEOUT_MAX if is_idle else _POLL_S)
                try:
                    self._look(landed)
                    is_away = False
                except DatabaseUnavailable as error:
                    if not is_away:
                        logger.warning("the database is away, and answers wait for it: %s", error)
                    is_away = True
                    time.sleep(_POLL_S)
                    self._wakeup.ring(None)
        except WaitStopped:
            pass

    def _look(self, landed: Iterable[int] | None) -> None:
        with self._lock:
            chosen = dict(self._open) if landed is None else {i: self._open[i] for i in landed if i in self._open}
        if not chosen:
            return
        found = landed_by_id(self._ledger, chosen)
        for chunk_id, job in chosen.items():
            chunk = found.get(chunk_id)
            if chunk is not None and chunk.num_results > job.num_seen:
                job.num_seen = chunk.num_results
                for result in stored_results(self._ledger, job.id, (0, -1)):
                    if (future := job.waiting.pop(result.line, None)) is not None:
                        _settle(future, result)
            if chunk is None or chunk.is_settled:
                for future in job.waiting.values():
                    _fail(future, JobNotFound(f"the Job {job.id}, which this prompt was in, was cancelled or deleted"))
                job.waiting.clear()
            if not job.waiting:
                self._wakeups.remove(job.id, self._wakeup)
                with self._lock:
                    del self._open[chunk_id]


def _settle(future: "Future[Result]", result: Result) -> None:
    with contextlib.suppress(InvalidStateError):  # failed already
        if not future.cancelled():
            future.set_result(result)


def _fail(future: "Future[Result]", error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        if not future.cancelled():
            future.set_exception(error)


def _cancel(futures: "Iterable[Future[Result]]") -> None:
    for future in futures:
        future.cancel()
