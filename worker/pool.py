"""The Celery pool that hands messages to the engine and completes them when it is done.

Celery asks a pool to run its tracer; this pool runs it when the outcome is there, so results, events and revokes stay
stock Celery while hundreds of Requests are in flight in one process.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from celery.concurrency.base import BasePool
from celery.worker import state

from protocol.celery_app import CHUNK_TASK, chunk_queues
from worker.call_service import CallService
from worker.chunk_service import ChunkService
from worker.stop_signals import heed_stop_signals
from worker.tickets import CallTicket, ChunkTicket, PoolTicket

logger = logging.getLogger("millrace.worker")

#: How often the pool compares what it consumes with what it has credit for, beside being told.
_RECONCILE_INTERVAL_S = 0.5


@dataclass(eq=False)
class PoolParts:
    """What the pool, its tasks and the consumer share; found on the app as `millrace`."""

    chunks: ChunkService
    calls: CallService
    models: tuple[str, ...]  # served names, its own first
    shared_queue: str
    consumer: Callable[[], Any]  # Celery's, None before it is made
    max_calls: int = 1  # messages of calls that are in flight at once
    interactive: Any = None  # worker.interactive_queues.InteractiveQueues, which makes itself known
    outcomes: dict[str, Any] = field(default_factory=dict)  # by task id, while the tracer runs
    tickets: set[PoolTicket] = field(default_factory=set)  # Celery keeps only weak references to them
    unreported: deque[tuple[PoolTicket, object]] = field(default_factory=deque)  # with outcomes, while Redis is away


class EnginePool(BasePool):  # type: ignore[misc]  # celery has no types
    """One per worker process."""

    body_can_be_buffer = True
    signal_safe = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts: PoolParts = self.app.millrace
        self.queues = chunk_queues(*self.parts.models)
        self._hub: Any = None

    def register_with_event_loop(self, loop: Any) -> None:
        self._hub = loop
        loop.call_repeatedly(_RECONCILE_INTERVAL_S, self.reconcile)

    def apply_async(
        self, target: Callable[..., Any], args: Any = None, kwargs: Any = None, **options: Any
    ) -> PoolTicket:
        """Runs on the hub. Celery's own would log the message's body at DEBUG."""
        # Celery's own Request: it has decoded the message's arguments.
        request = options["callback"].__self__
        kind = ChunkTicket if request.type == CHUNK_TASK else CallTicket
        ticket = kind(self, request, target, args, options)
        self.parts.tickets.add(ticket)
        ticket.hand_over()
        return ticket

    def on_start(self) -> None:
        heed_stop_signals(self.parts.chunks.hurry)

    def on_stop(self) -> None:
        """The consumer has stopped. What the services complete from here on still reaches Celery's backend."""
        self._hub = None
        self.parts.calls.close()
        self.parts.chunks.stop(lambda: self.parts.calls.num_open > 0)

    on_terminate = on_stop

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """No process is anybody's own here; Celery asks the ticket as well."""

    def on_hub(self, callback: Callable[..., Any], *args: Any) -> None:
        """Run in the hub's thread; once the hub has stopped, in the caller's, while the main thread waits for it."""
        hub = self._hub
        if hub is not None:
            hub.call_soon(callback, *args)
        else:
            callback(*args)

    def call_later(self, delay_s: float, callback: Callable[[], Any]) -> Any:
        """A timer of the hub, to be `cancel`led. Runs on the hub."""
        return self._hub.call_later(delay_s, callback)

    def reconcile(self) -> None:
        """Report what waits for that, end what was revoked, and consume each queue of Chunks exactly while there is
        credit for its classes. Runs on the hub."""
        unreported = self.parts.unreported
        while unreported and unreported[0][0].report(unreported[0][1]):
            unreported.popleft()
        for ticket in list(self.parts.tickets):
            if isinstance(ticket, CallTicket) and ticket.task_id in state.revoked:
                ticket.revoke()
        consumer = self.parts.consumer()
        if consumer is None or consumer.task_consumer is None:
            return
        for queue, ranks in self.queues.items():
            is_consuming = consumer.task_consumer.consuming_from(queue)
            has_credit = self.parts.chunks.has_credit(max(ranks))
            if has_credit and not is_consuming:
                consumer.add_task_queue(queue)
            elif not has_credit and is_consuming:
                consumer.cancel_task_queue(queue)

    def credit_changed(self) -> None:
        if self._hub is not None:
            self._hub.call_soon(self.reconcile)

    def _get_info(self) -> dict[str, Any]:
        """For `inspect stats` and Flower's page of a worker, which has a row for each."""
        return {**super()._get_info(), **self.parts.chunks.info(), "open_calls": self.parts.calls.num_open}
