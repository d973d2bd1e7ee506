"""Outcomes are told to Celery as soon as Redis takes them, in their order, and none is given up for an outage."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import TimeoutError as RedisTimeoutError

from worker.pool import EnginePool
from worker.tickets import PoolTicket


class Redis:
    """What the tracer stores to: away as long as there are errors left."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.told: list[str] = []

    def trace(self, task_id: str) -> tuple[int, Any, float]:
        """As Celery's: it raises where even the error cannot be stored, and returns it where that can."""
        if self.errors:
            error = self.errors.pop(0)
            if isinstance(error, RedisTimeoutError):
                raise error
            return 1, SimpleNamespace(exception=error), 0.0
        return 0, task_id, 0.0


@pytest.fixture
def pool() -> Any:
    parts = SimpleNamespace(outcomes={}, tickets=set(), unreported=deque(), consumer=lambda: None)
    return SimpleNamespace(parts=parts, on_hub=lambda act, *args: act(*args), queues={})


def ticket(pool: Any, redis: Redis, task_id: str) -> PoolTicket:
    request = SimpleNamespace(
        id=task_id, acknowledged=True, message=SimpleNamespace(channel=SimpleNamespace(closed=False))
    )
    options = {"accept_callback": None, "callback": lambda told: redis.told.append(told[1])}
    made = PoolTicket(pool, request, redis.trace, (task_id,), options)
    pool.parts.tickets.add(made)
    return made


def test_outcomes_wait_for_redis_and_are_told_in_their_order(pool: Any) -> None:
    redis = Redis(RedisTimeoutError("no answer"), ConnectionResetError("gone"))
    first, second = ticket(pool, redis, "first"), ticket(pool, redis, "second")
    first._finish("1 answer")
    # While one waits, the next is not even tried: it would hold up the event loop as long again.
    second._finish("2 answers")
    assert (redis.told, len(redis.errors)) == ([], 1)
    assert pool.parts.tickets == {first, second}

    EnginePool.reconcile(pool)
    assert (redis.told, redis.errors) == ([], [])
    EnginePool.reconcile(pool)

    assert redis.told == ["1 answer", "2 answers"]
    assert not pool.parts.tickets
    assert not pool.parts.unreported
    assert pool.parts.outcomes == {}


def test_what_celery_cannot_store_is_not_tried_for_ever(pool: Any, caplog: pytest.LogCaptureFixture) -> None:
    redis = Redis()
    broken = ticket(pool, redis, "broken")
    broken._callback = lambda told: int(told[1])
    broken._finish("1 answer")
    assert "the outcome of task broken could not be reported" in caplog.text
    assert not pool.parts.tickets
    assert not pool.parts.unreported
