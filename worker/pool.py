"""The Celery pool that hands messages to the engine and completes them when it is done.

Celery asks a pool to run its tracer; this pool runs it when the outcome is there, so results, events and revokes stay
stock Celery while hundreds of Requests are in flight in one process.
"""

import logging
import os
import time
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.concurrency.base import BasePool

from protocol.celery_app import CHUNK_TASK
from worker.chunk_service import ChunkService
from worker.stop_signals import heed_stop_signals

logger = logging.getLogger("millrace.worker")

#: How often the pool compares what it consumes with what it has credit for, beside being told.
_RECONCILE_INTERVAL_S = 0.5


class PoolTicket:
    """One message in flight. Acks and results belong to the hub's thread, so both calls hop there."""

    def __init__(self, pool: "EnginePool", target: Callable[..., Any], args: tuple[Any, ...], **callbacks: Any) -> None:
        self._pool = pool
        self._target = target
        self._args = args
        self._accept_callback = callbacks["accept_callback"]
        self._callback = callbacks["callback"]
        self._accepted_at = time.monotonic()
        # Celery's own Request: it has decoded the message's arguments.
        self.task_id: str = self._callback.__self__.id
        self.ranks = pool.queues[self._callback.__self__.delivery_info["routing_key"]]

    def accept(self) -> None:
        self._accepted_at = time.monotonic()
        self._pool.on_hub(self._accept_callback, os.getpid(), self._accepted_at)

    def complete(self, outcome: str) -> None:
        self._pool.on_hub(self._finish, outcome)

    def _finish(self, outcome: str) -> None:
        self._pool.outcomes[self.task_id] = outcome
        try:
            is_failure, value, _ = self._target(*self._args)
            # The tracer's own clock started when the engine was already done.
            self._callback((is_failure, value, time.monotonic() - self._accepted_at))
        except Exception:
            # The Results are in the ledger; a count that Celery cannot store must not take the worker's loop down.
            logger.exception("the outcome of task %s could not be reported", self.task_id)
        finally:
            self._pool.outcomes.pop(self.task_id, None)
            self._pool.tickets.discard(self)


class EnginePool(BasePool):  # type: ignore[misc]  # celery has no types
    """One per worker process; finds its ChunkService on the app it is made for."""

    body_can_be_buffer = True
    signal_safe = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.service: ChunkService = self.app.millrace_service
        self.outcomes: dict[str, str] = self.app.millrace_outcomes
        self.tickets: set[PoolTicket] = set()  # Celery keeps only weak references to what on_apply returns
        self._hub: Any = None
        self.queues: dict[str, tuple[int, ...]] = self.app.millrace_queues

    def register_with_event_loop(self, loop: Any) -> None:
        self._hub = loop
        loop.call_repeatedly(_RECONCILE_INTERVAL_S, self.reconcile)

    def on_apply(self, target: Callable[..., Any], args: Any = None, kwargs: Any = None, **options: Any) -> PoolTicket:
        ticket = PoolTicket(self, target, args, **options)
        self.tickets.add(ticket)
        self.service.receive(ticket)
        return ticket

    def on_start(self) -> None:
        heed_stop_signals(self.service.hurry)

    def on_stop(self) -> None:
        """The consumer has stopped. What the service completes from here on still reaches Celery's backend."""
        self._hub = None
        self.service.stop()

    on_terminate = on_stop

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """A Chunk's work belongs to its Job, so terminating the message stops nothing."""
        logger.warning("terminate is ignored for %s: cancel the Job instead", CHUNK_TASK)

    def on_hub(self, callback: Callable[..., Any], *args: Any) -> None:
        """Run in the hub's thread; once the hub has stopped, in the caller's, while the main thread waits for it."""
        hub = self._hub
        if hub is not None:
            hub.call_soon(callback, *args)
        else:
            callback(*args)

    def reconcile(self) -> None:
        """Consume each queue of Chunks exactly while there is credit for its classes. Runs on the hub."""
        consumer = self.app.millrace_consumer()
        if consumer is None or consumer.task_consumer is None:
            return
        for queue, ranks in self.queues.items():
            is_consuming, has_credit = consumer.task_consumer.consuming_from(queue), self.service.has_credit(max(ranks))
            if has_credit and not is_consuming:
                consumer.add_task_queue(queue)
            elif not has_credit and is_consuming:
                consumer.cancel_task_queue(queue)

    def credit_changed(self) -> None:
        if self._hub is not None:
            self._hub.call_soon(self.reconcile)

    def _get_info(self) -> dict[str, Any]:
        return {**super()._get_info(), "millrace": self.service.info()}


def register_tasks(app: Celery, outcomes: dict[str, str]) -> None:
    """The bodies run inside the tracer, when the outcome is known: they only pick it up."""

    # acks_late=False means acked when the pool accepts: once the lease is committed.
    @app.task(name=CHUNK_TASK, bind=True, acks_late=False)  # type: ignore[untyped-decorator]
    def chunk(self: Any, chunk_id: int) -> str:
        return outcomes[self.request.id]
