"""Tickets: the messages in flight, each from its arrival to what Celery is told of it.

Acks, results and events belong to the hub's thread, so what the services call hops there.
"""

import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from celery.worker import state
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from protocol.celery_app import CALL_TASKS, CHUNK_TASK
from protocol.requests import Kind
from worker.reply import CallExpired, Reply

if TYPE_CHECKING:
    from worker.pool import EnginePool

logger = logging.getLogger("millrace.worker")

#: What is raised where Redis does not take a result or a message.
_AWAY = (RedisError, OperationalError, OSError)


class PoolTicket:
    """`request` is Celery's own; `target` is its tracer, called with `args`; `options` are its callbacks and limits."""

    def __init__(
        self, pool: "EnginePool", request: Any, target: Callable[..., Any], args: Any, options: dict[str, Any]
    ) -> None:
        self._pool = pool
        self._request = request
        self._target = target
        self._args = args
        self._accept_callback = options["accept_callback"]
        self._callback = options["callback"]
        self._accepted_at = time.monotonic()
        self.task_id: str = request.id

    @property
    def delivery_tag(self) -> str:
        """Names the message among those the broker holds as unacked."""
        tag: str = self._request.message.delivery_tag
        return tag

    def hand_over(self) -> None:
        """To the service whose it is."""
        raise NotImplementedError

    def terminate(self, signum: int) -> None:
        """Celery has told everybody that the task was revoked."""

    def discard(self) -> None:
        """Ack, and tell nobody anything."""
        self._pool.on_hub(self._forget)

    def _accepted(self) -> None:
        self._accepted_at = time.monotonic()
        self._free_of_lost_channel()
        self._accept_callback(os.getpid(), self._accepted_at)

    def _finish(self, outcome: object) -> None:
        unreported = self._pool.parts.unreported
        # One after the other: each try with a Redis that does not answer holds the event loop up for seconds.
        if unreported or not self.report(outcome):
            unreported.append((self, outcome))

    def report(self, outcome: object) -> bool:
        """Tell Celery, on the hub; False where Redis does not take the outcome, which is then to be reported again."""
        parts = self._pool.parts
        parts.outcomes[self.task_id] = outcome
        self._free_of_lost_channel()
        try:
            is_failure, value, _ = self._target(*self._args)
            if is_failure and isinstance(value.exception, _AWAY):
                raise value.exception
            # The tracer's own clock started when the engine was already done.
            runtime_s = time.monotonic() - self._accepted_at
            self._callback((is_failure, value if is_failure else str(outcome), runtime_s))
        except _AWAY as error:
            logger.warning("the outcome of task %s waits for Redis: %s", self.task_id, type(error).__name__)
            return False
        except Exception:
            # What counts is stored already; what Celery cannot store must not take the worker's loop down.
            logger.exception("the outcome of task %s could not be reported", self.task_id)
        finally:
            parts.outcomes.pop(self.task_id, None)
        parts.tickets.discard(self)
        return True

    def _forget(self) -> None:
        self._pool.parts.tickets.discard(self)
        self._free_of_lost_channel()
        self._request.acknowledge()
        state.task_ready(self._request)

    def _free_of_lost_channel(self) -> None:
        """A message that came over a connection that is lost can only be acked by its tag, over the new one."""
        if self._request.message.channel.closed and not self._request.acknowledged:
            self._request.acknowledged = True
            self._pool.parts.interactive.ack_by_tag(self.delivery_tag)


class ChunkTicket(PoolTicket):
    """A chunk message: acked once the lease is committed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        queues, queue = self._pool.queues, self._request.delivery_info["routing_key"]
        #: The classes whose Chunks the message is for; any class, where it came by another way than our own.
        self.ranks: tuple[int, ...] = queues.get(queue) or tuple(rank for ranks in queues.values() for rank in ranks)

    def hand_over(self) -> None:
        self._pool.parts.chunks.receive(self)

    def accept(self) -> None:
        self._pool.on_hub(self._accepted)

    def complete(self, outcome: str) -> None:
        self._pool.on_hub(self._finish, outcome)

    def terminate(self, signum: int) -> None:
        logger.warning("terminate is ignored for %s, whose work belongs to its Job: cancel that", CHUNK_TASK)


class CallTicket(PoolTicket):
    """A call: acked when its caller has been told."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        *_, options = args
        self.kind: Kind = CALL_TASKS[self._request.type]
        self.args, self.kwargs = self._request.args, self._request.kwargs
        self.priority = int(self._request.delivery_info.get("priority") or 0)
        expires = self._request.expires
        #: From its arrival, by the clock of whoever set it.
        self.expires_in_s = None if expires is None else (expires - datetime.now(UTC)).total_seconds()
        self._timeout_s: float | None = options.get("timeout")
        self._timeout_callback = options["timeout_callback"]
        self._timer: Any = None

    def hand_over(self) -> None:
        self._accepted()
        if self._timeout_s:
            self._timer = self._pool.call_later(self._timeout_s, self._time_out)
        self._pool.parts.calls.receive(self)

    def complete(self, outcome: Reply | Exception) -> None:
        self._pool.on_hub(self._expire if isinstance(outcome, CallExpired) else self._finish, outcome)

    def revoke(self) -> None:
        """As Celery does with a task that runs when it is asked to terminate it. Runs on the hub."""
        self._free_of_lost_channel()
        self._request.terminate(self._pool)

    def terminate(self, signum: int) -> None:
        self._pool.parts.calls.cancel(self.task_id)

    def _time_out(self) -> None:
        """The caller's hard time limit, which Celery reports as TimeLimitExceeded."""
        if self in self._pool.parts.tickets:
            self._timeout_callback(False, self._timeout_s)
            self._pool.parts.calls.cancel(self.task_id)

    def _finish(self, outcome: object) -> None:
        self._end_timer()
        super()._finish(outcome)

    def _expire(self, outcome: object) -> None:
        """The caller is told what Celery tells of a task that has expired before it was begun."""
        self._end_timer()
        self._pool.parts.tickets.discard(self)
        self._free_of_lost_channel()
        state.revoked.add(self.task_id)  # whatever the clock says that `revoked` looks at
        try:
            self._request.revoked()
        except Exception:
            logger.exception("the end of task %s, which has expired, could not be reported", self.task_id)

    def _forget(self) -> None:
        self._end_timer()
        super()._forget()

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
