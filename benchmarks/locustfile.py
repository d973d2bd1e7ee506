"""Locust's users: each enqueues one prompt through the client, waits for its answer, and does it again.

    locust -f benchmarks/locustfile.py --headless --users 100 --run-time 60s

The system they meet is the one that the MILLRACE_* variables or a millrace.toml name; `make load` starts one of its
own. No two prompts are equal, so that every answer is computed.
"""

import itertools
import logging
import time
from typing import Any

from locust import User, constant, events, task

from producer import Client
from protocol.sampling import SamplingParams

#: Seconds after which an answer that has not come is a failure.
_PATIENCE_S = 120.0
_PARAMS = SamplingParams(max_tokens=8, temperature=0)

_numbers = itertools.count(1)


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def connect(environment: Any, **_: Any) -> None:
    """One client for all users of the process, as a web backend has."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    environment.millrace = Client()


@events.test_stop.add_listener  # type: ignore[untyped-decorator]
def disconnect(environment: Any, **_: Any) -> None:
    environment.millrace.close()


class Asker(User):  # type: ignore[misc]  # locust's User is untyped
    wait_time = constant(0)

    @task  # type: ignore[untyped-decorator]
    def ask(self) -> None:
        prompt = f"def handler_{next(_numbers)}_{time.time_ns()}(request):\n"
        start = time.perf_counter()
        error: Exception | None = None
        num_characters = 0
        try:
            result = self.environment.millrace.ask(prompt, params=_PARAMS, timeout_s=_PATIENCE_S)
            if result.answer is None:
                error = RuntimeError(result.failure.code)
            else:
                num_characters = len(result.answer.text)
        except Exception as raised:
            error = raised
        self.environment.events.request.fire(
            request_type="ask",
            name="generate",
            response_time=(time.perf_counter() - start) * 1000,
            response_length=num_characters,
            exception=error,
        )
