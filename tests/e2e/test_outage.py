"""Redis and the ledger away at once, for longer than a lease: workers wait, come back and go on, and their engines keep
what they run. `python -m benchmarks.outage` shows the same of a minute, and on PostgreSQL."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from celery.result import AsyncResult
from sqlalchemy import func, select

from producer.client import Client
from protocol.sampling import SamplingParams
from protocol.settings import Settings
from storage.clock import now
from storage.ledger import Ledger
from storage.tables import chunks, is_leased
from tests.conftest import free_port
from tests.e2e.conftest import PATIENCE_S
from tests.e2e.foreign import Beside, foreign_app, generate, wait_until
from worker.local.redis_server import find_redis_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

#: As many tokens as the model holds beside the prompt.
MAX_TOKENS = 480
NUM_REQUESTS = 128


@contextmanager
def redis_at(port: int, folder: Path) -> Iterator[None]:
    """An empty one that forgets everything."""
    command = [find_redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def num_leases(ledger: Ledger, *, run_out: bool) -> int:
    is_over = chunks.c.leased_until <= now()
    statement = select(func.count()).where(is_leased, is_over if run_out else ~is_over)
    return ledger.read(lambda connection: connection.scalar(statement)) or 0


def test_workers_outlive_an_outage_with_all_that_their_engines_run(model: Path, tmp_path: Path) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    with ExitStack() as stack:
        redis = stack.enter_context(ExitStack())
        redis.enter_context(redis_at(port, tmp_path))
        beside = Beside(tmp_path, url, model)
        stack.callback(beside.stop_all)
        for name in ("one", "two"):
            beside.start("worker", log=name)
        wait_until(lambda: all(" ready." in beside.log(name).read_text() for name in ("one", "two")), "workers' start")
        app = stack.enter_context(foreign_app(url))
        client = stack.enter_context(
            Client(Settings(broker_url=url, database_url=beside.database_url, model_name="tiny", chunk_requests=16))
        )
        ledger = stack.enter_context(closing(Ledger(beside.database_url)))
        before = set(beside.engines())
        assert len(before) == 2

        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
        job = client.submit([f"prompt {i}" for i in range(NUM_REQUESTS)], params=params)
        wait_until(lambda: client.status(job).num_ok > 0)
        # They go on once everything is away, so that the call is in flight then, and work is left.
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        called = generate(app, "in flight", max_tokens=MAX_TOKENS, ignore_eos=True).delay()
        wait_until(lambda: called.id in str(app.control.inspect(timeout=1, limit=2).active()))
        writer = stack.enter_context(closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None, timeout=30)))
        writer.execute("BEGIN EXCLUSIVE")
        num_leased = num_leases(ledger, run_out=False)
        redis.close()
        for pid in before:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: num_leases(ledger, run_out=True) >= num_leased > 1, "leases running out")
        redis.enter_context(redis_at(port, tmp_path))
        writer.rollback()

        status = client.wait(job, timeout_s=PATIENCE_S)
        reply = AsyncResult(called.id, app=app).get(timeout=PATIENCE_S)

        assert (status.num_ok, status.num_error) == (NUM_REQUESTS, 0)
        assert client.verify(job).holds
        # Nobody took what another one was at.
        attempts = ledger.read(lambda connection: connection.scalars(select(chunks.c.attempt)).all())
        assert set(attempts) == {1}
        assert reply["usage"]["completion_tokens"] == MAX_TOKENS
        assert set(beside.engines()) == before
