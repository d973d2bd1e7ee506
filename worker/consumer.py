"""Celery's consumer, made to survive the loss of its broker, and to say nothing of what messages hold.

Celery logs the bodies of messages it cannot use. Here their senders learn what is wrong, where they can be told, and
the log has names and types alone.
"""

import logging
import random
import time
from collections.abc import Callable
from functools import partial
from queue import Empty
from typing import Any

from celery.exceptions import NotRegistered
from celery.utils.objects import Bunch
from celery.worker.consumer import Consumer as CeleryConsumer

from protocol.celery_app import CALL_TASKS, CHUNK_TASK, interactive_queue

logger = logging.getLogger("millrace.worker")

#: Between two tries to reach a broker that is away, at most: kombu's own pauses grow to half a minute, for which calls
#: would wait though the broker is back. Who lost it together does not come back together.
_RECONNECT_S = (1.0, 3.0)
#: How long an event may wait for others, to be published with them.
_EVENTS_DELAY_S = 0.1
#: Before another try with a Redis that answers and refuses, as one does that is full.
_REFUSED_PAUSE_S = 1.0
#: Characters of a name from outside that go into the log.
_MAX_NAME = 100


class Consumer(CeleryConsumer):  # type: ignore[misc]  # celery has no types
    _is_flush_due = False

    def connect(self) -> Any:
        connection = super().connect()
        self._drop_nonsense(connection.transport.cycle)
        return connection

    def ensure_connected(self, conn: Any) -> Any:
        """Waits for the broker as long as it takes."""
        conn.ensure_connection = partial(conn.ensure_connection, interval_max=random.uniform(*_RECONNECT_S))
        return super().ensure_connected(conn)

    def _drop_nonsense(self, cycle: Any) -> None:
        """What somebody put on a queue and is no message at all would take the loop down where kombu parses it."""
        read, expected = cycle.on_readable, (Empty, *self.connection_errors, *self.channel_errors)

        def on_readable(fileno: int) -> None:
            try:
                read(fileno)
            except expected:
                raise
            except Exception as error:
                logger.error("what came over a queue is no message (%s): it is dropped", type(error).__name__)

        cycle.on_readable = on_readable

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """kombu 5.7 would put unacked messages back through the connection that has just been lost, and end the worker
        with an AttributeError. They are safe without that: the ledger has every Chunk, claimed or not, and calls are
        handed out again when nobody renews them."""
        if self.task_consumer is not None:
            self.task_consumer.channel.qos.restore_at_shutdown = False
            self.app.millrace.interactive.connection_lost()
        super().on_connection_error_after_connected(exc)
        if isinstance(exc, self.channel_errors):
            time.sleep(_REFUSED_PAUSE_S)

    def on_send_event_buffered(self) -> None:
        """Celery would publish after every event, which costs a worker more than the events' Chunk."""
        if not self._is_flush_due and self.hub:
            self._is_flush_due = True
            self.hub.call_later(_EVENTS_DELAY_S, self._flush_due_events)

    def _flush_due_events(self) -> None:
        self._is_flush_due = False
        self._flush_events()

    def update_strategies(self) -> None:
        """Celery's built-in tasks are left to other workers, as everything else that is not served here."""
        super().update_strategies()
        for name in [name for name in self.strategies if name != CHUNK_TASK and name not in CALL_TASKS]:
            del self.strategies[name]

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        handler = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            try:
                handler(message)
            except self.connection_errors:
                raise
            except Exception as error:
                # What Celery does not expect of a body must not take the loop down.
                self.on_invalid_task(None, message, error)

        return on_task_received

    def on_unknown_message(self, body: Any, message: Any) -> None:
        logger.warning("a message on the queue %s is no task: it is dropped", _queue(message))
        message.reject_log_error(logger, self.connection_errors)

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Somebody else's task on the shared queue is left to them."""
        parts = self.app.millrace
        task_id, name = _identity(message)
        if _queue(message) == parts.shared_queue and (name in CALL_TASKS or not name.startswith("millrace.")):
            parts.interactive.put_back(message, task_id, name)
            return
        if name in CALL_TASKS:
            model = parts.models[0]
            error: Exception = ValueError(
                f"unsupported_kind: the model {model!r} is not served for {CALL_TASKS[name]}: send the task to "
                f"the queue of a model that is, which is called like {interactive_queue(model)}"
            )
        else:
            error = NotRegistered(name)
        self._refuse(message, error, "is unknown here")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._refuse_unreadable(message, exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._refuse_unreadable(message, exc)

    def _refuse_unreadable(self, message: Any, exc: Exception) -> None:
        accepted = " and ".join(sorted(self.app.conf.accept_content))
        error = ValueError(
            f"unreadable_message: the task cannot be read ({type(exc).__name__}): it must be {accepted}, with a list "
            "of arguments and a mapping of keyword arguments"
        )
        self._refuse(message, error, f"cannot be read ({type(exc).__name__})")

    def _refuse(self, message: Any, error: Exception, reason: str) -> None:
        """The sender's `get()` raises the error."""
        task_id, name = _identity(message)
        logger.error("the task %s [%s] on the queue %s %s: it is refused", name, task_id, _queue(message), reason)
        message.reject_log_error(logger, self.connection_errors)
        if not task_id or name == CHUNK_TASK:
            return
        properties = message.properties or {}
        request = Bunch(
            name=name,
            chord=None,
            errbacks=None,
            root_id=None,
            correlation_id=properties.get("correlation_id"),
            reply_to=properties.get("reply_to"),
        )
        self.app.backend.mark_as_failure(task_id, error, request=request)
        if self.event_dispatcher:
            self.event_dispatcher.send("task-failed", uuid=task_id, exception=repr(error))


def _queue(message: Any) -> str:
    return str((message.delivery_info or {}).get("routing_key"))[:_MAX_NAME]


def _identity(message: Any) -> tuple[str, str]:
    """The task's id and name, empty where the message does not say."""
    headers = message.headers if isinstance(message.headers, dict) else {}
    task_id, name = headers.get("id"), headers.get("task")
    return str(task_id)[:_MAX_NAME] if task_id else "", str(name)[:_MAX_NAME] if name else ""
