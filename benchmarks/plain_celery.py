"""Plain Celery, made well: one prompt per task, msgpack both ways, answers through the Redis result backend.

    python -m benchmarks.plain_celery URL POOL CONCURRENCY     a worker

Everything that costs without being asked for is off: events, heartbeats, gossip, task-sent events, the debug of the
tracer. Messages are published in batches, one round trip for many, and answers are read back in batches too.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery

from benchmarks.null_engine import ANSWER

TASK = "plain.answer"
QUEUE = "plain"
#: (pool, concurrency) pairs that are tried; the fastest is what Millrace is compared with.
VARIANTS = (("prefork", 2), ("prefork", 4), ("threads", 64), ("threads", 256), ("gevent", 256))
_PREFETCH = 64
_READ_AT_ONCE = 1000


def make_app(url: str) -> Celery:
    app = Celery("plain", broker=url, backend=url, set_as_current=False)
    app.conf.update(
        task_serializer="msgpack",
        result_serializer="msgpack",
        accept_content=["msgpack"],
        task_default_queue=QUEUE,
        task_send_sent_event=False,
        worker_send_task_events=False,
        worker_prefetch_multiplier=_PREFETCH,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
    )

    app.task(_answer, name=TASK)
    return app


def _answer(prompt: str) -> str:
    return ANSWER


@contextmanager
def running_worker(url: str, pool: str, concurrency: int, log: Path) -> Iterator[Celery]:
    """Entered once the worker answers."""
    command = [sys.executable, "-m", "benchmarks.plain_celery", url, pool, str(concurrency)]
    with log.open("ab") as output:
        worker = subprocess.Popen(command, stdout=output, stderr=output)
    app = make_app(url)
    try:
        while not app.control.ping(timeout=0.5):
            if worker.poll() is not None:
                raise RuntimeError(f"the plain worker ({pool}) did not start: see {log}")
        yield app
    finally:
        worker.terminate()
        worker.wait()
        app.close()


def prompts_per_second(app: Celery, prompts: Sequence[str]) -> float:
    """From the first publish to the last answer in hand."""
    started = time.perf_counter()
    pending = _publish(app, prompts)
    while pending:
        pending = _unanswered(app, pending)
    return len(prompts) / (time.perf_counter() - started)


def round_trips(
    app: Celery, prompts: Sequence[str], task: str = TASK, queue: str = QUEUE, **parameters: Any
) -> list[float]:
    """Seconds of each, one after the other through an idle worker."""
    seconds = []
    for prompt in prompts:
        started = time.perf_counter()
        assert app.send_task(task, (prompt,), parameters, queue=queue).get(timeout=30) is not None
        seconds.append(time.perf_counter() - started)
    return seconds


def _publish(app: Celery, prompts: Sequence[str]) -> list[str]:
    task, ids = app.tasks[TASK], []
    # Answers are polled for, many at a time: a subscription for each task would be a round trip for each.
    app.backend.on_task_call = lambda producer, task_id: {}
    with app.producer_pool.acquire(block=True) as producer, producer.batch():
        for prompt in prompts:
            ids.append(task.apply_async((prompt,), producer=producer).id)
    return ids


def _unanswered(app: Celery, ids: list[str]) -> list[str]:
    """Those of the tasks whose answer is not there yet; the others' is read."""
    backend: Any = app.backend
    left: list[str] = []
    num_read = 0
    for start in range(0, len(ids), _READ_AT_ONCE):
        batch = ids[start : start + _READ_AT_ONCE]
        for task_id, reply in zip(batch, backend.mget([backend.get_key_for_task(i) for i in batch]), strict=True):
            if reply is None:
                left.append(task_id)
            else:
                num_read += backend.decode_result(reply)["result"] == ANSWER
        if reply is None:  # the rest is not there either
            left += ids[start + _READ_AT_ONCE :]
            break
    if not num_read:
        time.sleep(0.01)
    return left


def main() -> int:
    url, pool, concurrency = sys.argv[1:]
    options = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING"]
    app = make_app(url)
    app.worker_main(["worker", "--pool", pool, "--concurrency", concurrency, "--queues", QUEUE, *options])
    return 0


if __name__ == "__main__":
    if "gevent" in sys.argv:
        from gevent import monkey

        monkey.patch_all()
    sys.exit(main())
