"""The Celery tasks. Their bodies run inside Celery's tracer, when the outcome is known: they only pick it up."""

from collections.abc import Collection
from typing import Any

from celery import Celery, Task

from protocol.celery_app import CALL_TASKS, CHUNK_TASK
from protocol.requests import Kind
from worker.pool import PoolParts
from worker.quiet_request import QuietRequest


class _AnyKeyword(Task):  # type: ignore[misc]  # celery has no types
    """Celery's own `__call__` takes a caller's keyword `self` for the task."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def register_tasks(app: Celery, parts: PoolParts, kinds: Collection[Kind]) -> None:
    """`kinds` are what this worker's model can be called for."""

    def outcome(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        found = parts.outcomes[self.request.id]
        if isinstance(found, Exception):
            raise found
        return found

    # acks_late=False means acked when the pool accepts: once the lease is committed.
    app.task(outcome, name=CHUNK_TASK, bind=True, acks_late=False, Request=QuietRequest)
    for name, kind in CALL_TASKS.items():
        if kind in kinds:
            app.task(
                outcome,
                name=name,
                bind=True,
                base=_AnyKeyword,
                acks_late=True,
                # What a caller or the engine did wrong is no error of this program's: no traceback in the log.
                throws=(ValueError, RuntimeError),
                Request=QuietRequest,
                Strategy="worker.interactive_queues:call_strategy",
            )
