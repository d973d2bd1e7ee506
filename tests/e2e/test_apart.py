"""The same parts run apart: migrate, workers, submit, status and results over one Redis and one database."""

import json
import re
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import redis
from sqlalchemy import select

from producer.client import Client
from protocol.celery_app import make_app
from protocol.settings import Settings
from storage.ledger import Ledger
from storage.tables import chunks
from tests.e2e.conftest import Running, Start
from tests.e2e.mixed_job import write_mixed_job

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

LEASE_S = 3


@pytest.fixture
def millrace(start: Start, database_url: str, redis_url: str, model: Path) -> Callable[..., Running]:
    """The console script over this test's servers."""

    def run(*arguments: str) -> Running:
        return start(
            *arguments,
            broker_url=redis_url,
            database_url=database_url,
            engine_model=str(model),
            lease_seconds=str(LEASE_S),
        )

    return run


def num_workers(settings: Settings) -> int:
    with make_app(settings) as app:
        return len(app.control.ping(timeout=0.5))


def owners(ledger: Ledger) -> set[str | None]:
    statement = select(chunks.c.owner).distinct()
    return ledger.read(lambda connection: set(connection.scalars(statement)))


def test_two_workers_share_a_job_and_one_may_die(
    millrace: Callable[..., Running], database_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = Settings(broker_url=redis_url, database_url=database_url, model_name="tiny")
    job = write_mixed_job(tmp_path / "prompts.jsonl")
    options = ["--max-tokens", "40", "--temperature", "0"]
    code, stdout, _ = millrace("migrate").finish()
    assert code == 0
    assert "up to date" in stdout
    workers = [millrace("worker"), millrace("worker")]
    for worker in workers:
        worker.wait_until(lambda: num_workers(settings) == 2)

    submit = millrace("submit", "prompts.jsonl", "--wait", "-o", "results.jsonl", *options)
    with Client(settings) as client, closing(Ledger(database_url)) as ledger:
        submit.wait_until(lambda: client.jobs() and client.status(client.jobs()[0]).num_ok >= 60)
        assert len(owners(ledger) - {None}) == 2
        # What it has leased comes free when the lease runs out, and goes to the other.
        workers[0].below()
        workers[0].process.kill()
        workers[0].process.wait()
        code, stdout, stderr = submit.finish()

        assert code == 0, stderr
        rows = job.check(tmp_path / "results.jsonl")
        status = client.status(stdout.strip())
        assert (status.job.state, status.num_ok, status.num_error) == ("finished", len(rows) - 8, 8)
        # Also twins that came to two workers at the same time, and those whose first worker died.
        assert status.num_cached == 50
    assert workers[0].leaves_no_process()

    # The answers are in the database, whatever becomes of Redis.
    with redis.Redis.from_url(redis_url) as server:
        server.flushall()
    again = millrace("submit", "prompts.jsonl", "--job", "again", "--wait", *options)
    assert again.finish()[0] == 0
    code, stdout, _ = millrace("status", "again", "--json").finish()
    shown = json.loads(stdout)
    assert (shown["state"], shown["num_ok"], shown["computed_tokens"]) == ("finished", len(rows) - 8, 0)
    code, stdout, _ = millrace("results", "again").finish()
    written = [json.loads(line) for line in stdout.splitlines()]
    assert [row["text"] for row in written] == [row["text"] for row in rows]

    # Told to stop in the middle of a Job, it finishes what it has begun; told twice, it gives that back.
    more = ["--temperature", "0", "--max-tokens", "60", "--job"]
    assert millrace("submit", "prompts.jsonl", *more, "drained").finish()[0] == 0
    with Client(settings) as client:
        workers[1].wait_until(lambda: client.status("drained").num_requests_leased > 0)
        workers[1].below()
        workers[1].process.terminate()
        code, _, stderr = workers[1].finish()
        assert code == 0
        assert workers[1].leaves_no_process()
        status = client.status("drained")
        assert 0 < status.num_ok < len(rows) - 8
        assert status.num_requests_leased == 0
        num_finished = int(re.findall(r"of (\d+) chunks \1 were finished and 0 given back", stderr)[-1])
        assert num_finished > 0

        hasty = millrace("worker", "--drain-seconds", "600")
        hasty.wait_until(lambda: client.status("drained").num_requests_leased > 0)
        hasty.below()
        hasty.process.send_signal(signal.SIGHUP)
        hasty.process.send_signal(signal.SIGQUIT)
        code, _, stderr = hasty.finish()
        assert code == 0
        assert re.search(r"and [1-9]\d* given back", stderr), stderr
        assert client.status("drained").num_requests_leased == 0
    assert hasty.leaves_no_process()
