"""InteractiveQueues: consumes calls over a channel of its own, with a prefetch of its own, so that none waits for bulk.

It also keeps this worker's claim on messages that are not acked yet: Redis hands out again what nobody has renewed for
the visibility timeout, which is as short as a lease, so that a dead worker's calls are soon answered by another.
"""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.worker.consumer.tasks import Tasks
from celery.worker.control import inspect_command
from celery.worker.state import task_reserved
from celery.worker.strategy import default as default_strategy

from protocol.celery_app import interactive_queue

logger = logging.getLogger("millrace.worker")

#: A claim is renewed this many times within the visibility timeout.
_RENEWALS = 3
#: Seconds a task that nobody took is kept, longer each time, before it goes back to its queue; and for how many of them
#: the times are remembered.
_FIRST_HOLD_S = 1.0
_LAST_HOLD_S = 30.0
_MAX_HELD = 10_000


class InteractiveQueues(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
    """A step of Celery's consumer. Everything here runs on the hub, and it acts as the `qos` of its messages."""

    requires = (Tasks,)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._celery = consumer
        self._parts = consumer.app.millrace
        self._parts.interactive = self
        self._lease_s: float = consumer.app.conf.broker_transport_options["visibility_timeout"]
        self._num_returns: Counter[str] = Counter()  # by task id
        self._left: set[str] = set()  # names of tasks that were somebody else's
        self._channel: Any = None
        self._consumer: Any = None

    def start(self, consumer: Any) -> None:
        self._channel = consumer.connection.channel()
        self._num_waiting = 0  # messages that are kept for a later time, and so do not count
        self._set_prefetch()
        queues = consumer.app.amqp.queues
        names = filter(None, (*map(interactive_queue, self._parts.models), self._parts.shared_queue))
        self._consumer = consumer.app.amqp.TaskConsumer(
            self._channel,
            queues=[queues[name] if name in queues else queues.new_missing(name) for name in names],
            on_decode_error=consumer.on_decode_error,
        )
        self._consumer.on_message = consumer.create_task_handler()
        self._consumer.consume()

    def stop(self, consumer: Any) -> None:
        """Takes nothing more; what is open here can still be acked."""
        if self._consumer is not None:
            with contextlib.suppress(*consumer.connection_errors):
                self._consumer.cancel()

    def shutdown(self, consumer: Any) -> None:
        """What is still open goes back to its queue at once."""
        if self._consumer is not None:
            with contextlib.suppress(*consumer.connection_errors):
                self._consumer.close()
                self._channel.close()

    def connection_lost(self) -> None:
        """kombu would put unacked messages back through the connection that has just been lost, and end the worker."""
        if self._channel is not None:
            self._channel.qos.restore_at_shutdown = False

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        hub.call_repeatedly(self._lease_s / _RENEWALS, self._renew)

    @property
    def queues(self) -> list[Any]:
        """Those consumed, as kombu has them."""
        return list(self._consumer.queues) if self._consumer is not None else []

    def increment_eventually(self, n: int = 1) -> None:
        """One more message waits for its time (ETA, countdown)."""
        self._num_waiting += n
        self._set_prefetch()

    def decrement_eventually(self, n: int = 1) -> None:
        self._num_waiting -= n
        self._set_prefetch()

    def put_back(self, message: Any, task_id: str, name: str) -> None:
        """A message for other workers: to the end of its queue, at once or, if none took it there, after a while."""
        is_new, queue = name not in self._left, self._parts.shared_queue
        logger.log(
            logging.INFO if is_new else logging.DEBUG,
            "the task %s on the queue %s is not this worker's: it stays there for others", name, queue,
        )  # fmt: skip
        self._left.add(name)
        num_returns = self._num_returns[task_id]
        if len(self._num_returns) >= _MAX_HELD:
            self._num_returns.clear()
            self._left.clear()
        self._num_returns[task_id] = num_returns + 1
        # While a message is handled nothing is asked for, so that whoever waits for this one gets it before us.
        if num_returns % 2 == 0:
            message.reject_log_error(logger, self._celery.connection_errors, requeue=True)
            return
        self.increment_eventually()
        hold_s = min(_FIRST_HOLD_S * 2 ** min(num_returns // 2, 10), _LAST_HOLD_S)
        self._celery.hub.call_later(hold_s, self._return, message)

    def ack_by_tag(self, delivery_tag: str) -> None:
        """Ack a message that came over an earlier connection."""
        with contextlib.suppress(*self._celery.connection_errors), self._channel.conn_or_acquire() as client:
            client.pipeline().zrem(self._channel.unacked_index_key, delivery_tag).hdel(
                self._channel.unacked_key, delivery_tag
            ).execute()

    def _return(self, message: Any) -> None:
        if message.channel is self._channel:
            self.decrement_eventually()
            message.reject_log_error(logger, self._celery.connection_errors, requeue=True)

    def _set_prefetch(self) -> None:
        self._channel.basic_qos(0, self._parts.max_calls + self._num_waiting, False)

    def _renew(self) -> None:
        channels = [self._channel, *([self._celery.task_consumer.channel] if self._celery.task_consumer else [])]
        tags = {ticket.delivery_tag for ticket in self._parts.tickets}
        for channel in channels:
            tags |= channel.qos._delivered.keys() - channel.qos._dirty
        if not tags:
            return
        try:
            with self._channel.conn_or_acquire() as client:
                # What is acked, or was handed out to somebody else, is there no more and stays away.
                client.zadd(self._channel.unacked_index_key, dict.fromkeys(tags, time.time()), xx=True)
        except self._celery.connection_errors as error:
            logger.warning("the claim on %d messages could not be renewed: %s", len(tags), type(error).__name__)


def show_all_queues() -> None:
    """`inspect active_queues` and Flower know one consumer alone: have them told of both."""

    def active_queues(state: Any, **_: Any) -> list[dict[str, Any]]:
        consumer = state.consumer
        queues = consumer.task_consumer.queues if consumer.task_consumer else []
        return [dict(queue.as_dict(recurse=True)) for queue in [*queues, *state.app.millrace.interactive.queues]]

    inspect_command(name="active_queues")(active_queues)


class _ConsumerOfCalls:
    """Celery's consumer as a task's strategy sees it, with the prefetch of the interactive queues."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    @property
    def qos(self) -> InteractiveQueues:
        interactive: InteractiveQueues = self._consumer.app.millrace.interactive
        return interactive

    def apply_eta_task(self, request: Any) -> None:
        """Its time has come."""
        task_reserved(request)
        self._consumer.on_task_request(request)
        self.qos.decrement_eventually()


def call_strategy(task: Any, app: Any, consumer: Any) -> Callable[..., Any]:
    """How a message of a call becomes a request."""
    handler: Callable[..., Any] = default_strategy(task, app, _ConsumerOfCalls(consumer))
    return handler
