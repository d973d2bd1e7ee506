"""A worker killed at every step of a Chunk's life: another one, asleep meanwhile, finishes the Job, every line once;
and a submission killed while it makes Chunks, which the same command goes on with.

The engine answers everything at once, so that nothing here depends on a model.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from benchmarks.null_engine import ANSWER, write_null_model
from producer.client import Client
from protocol.faults import FAULT_VARIABLE
from protocol.sampling import SamplingParams
from protocol.settings import EngineSettings, Settings
from storage.ledger import Ledger
from tests.conftest import PostgresCluster
from tests.e2e.conftest import PATIENCE_S, ROOT
from tests.e2e.nursery import Forked, Nursery
from worker.local.system import settings_environ

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills workers that have children")

#: Each on one kind of database, since starting a worker takes seconds; the ledger's own tests try both.
POINTS = [
    *[("sqlite", point) for point in ("claimed", "prepared", "before commit", "committed")],
    *[("postgresql", point) for point in ("accepted", "tokens", "within commit", "job closed")],
]


#: Of processes without settings.
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
PLAIN |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
#: Of the process that submits.
PRODUCER_POINTS = [("sqlite", "appended"), ("postgresql", "all appended")]


class Workers:
    """Workers over one Redis and one database."""

    def __init__(self, nursery: Nursery, settings: Settings, folder: Path) -> None:
        self._nursery, self.settings, self.folder = nursery, settings, folder
        self.other = self.start()

    def environ(self, fault: str = "") -> dict[str, str]:
        return {**PLAIN, **settings_environ(self.settings), FAULT_VARIABLE: fault}

    def start(self, fault: str = "") -> Forked:
        return self._nursery.start(self.environ(fault))


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with closing(Nursery(tmp_path_factory.mktemp("nursery"), PLAIN)) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def workers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis_server: str, nursery: Nursery
) -> Iterator[Workers]:
    """On the kind of database that is this fixture's parameter."""
    folder = tmp_path_factory.mktemp("kill-points")
    write_null_model(folder / "null")
    url = f"sqlite:///{folder}/ledger.db"
    if request.param == "postgresql":
        cluster: PostgresCluster = request.getfixturevalue("postgres_cluster")
        url = cluster.url(cluster.create("template_ledger"))
    settings = Settings(
        broker_url=redis_server,
        database_url=url,
        engine=EngineSettings(model=str(folder / "null")),
        lease_seconds=1.0,
        chunk_requests=8,
        drain_seconds=0.0,
    )
    with closing(Ledger(url)) as ledger:
        ledger.migrate()
    workers = Workers(nursery, settings, folder)
    yield workers
    # The next ones have the same Redis.
    workers.other.send_signal(signal.SIGKILL)
    assert workers.other.wait(PATIENCE_S) == -signal.SIGKILL


@pytest.mark.parametrize(("workers", "point"), POINTS, indirect=["workers"])
def test_a_worker_killed_there_loses_and_repeats_nothing(workers: Workers, point: str) -> None:
    other = workers.other
    other.send_signal(signal.SIGSTOP)
    try:
        doomed = workers.start(f"kill:{point}:1")
        with Client(workers.settings) as client:
            prompts = [{"prompt": f"{point} {i}"} for i in range(30)]
            job = client.submit(prompts, name=point, params=SamplingParams(temperature=0.0))
            assert doomed.wait(PATIENCE_S) == -signal.SIGKILL
            before = list(client.results(job, wait=False))
            other.send_signal(signal.SIGCONT)
            status = client.wait(job, timeout_s=PATIENCE_S)

            results = list(client.results(job))
            assert [result.line for result in results] == list(range(1, 31))
            assert {result.answer.text for result in results if result.answer is not None} == {ANSWER}
            assert (status.num_ok, status.num_error) == (30, 0)
            assert client.verify(job).holds
            # What was committed is never written again.
            assert [result for result in results if result in before] == before
            with closing(Ledger(workers.settings.database_url)) as ledger:
                attempts = ledger.read(
                    lambda connection: connection.execute(
                        text("SELECT max(attempt) FROM chunks WHERE job_id = :job"), {"job": job.id}
                    ).scalar_one()
                )
            assert attempts <= 2
    finally:
        other.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(("workers", "point"), PRODUCER_POINTS, indirect=["workers"])
def test_a_submission_killed_there_is_gone_on_with_by_the_same_command(workers: Workers, point: str) -> None:
    path = workers.folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{point} {i}"}) + "\n" for i in range(30)))
    command = [sys.executable, "-m", "cli.main", "submit", str(path), "--temperature", "0"]

    def submit(fault: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, env=workers.environ(fault), cwd=workers.folder, capture_output=True, text=True, timeout=PATIENCE_S
        )

    assert submit(f"kill:{point}:{2 if point == 'appended' else 1}").returncode == -signal.SIGKILL

    with Client(workers.settings) as client:
        (job,) = [job for job in client.jobs() if job.state == "submitting"]
        assert client.status(job).num_lines == (16 if point == "appended" else 30)
        again = submit("")
        assert (again.returncode, again.stdout.strip()) == (0, job.id), again.stderr
        status = client.wait(job, timeout_s=PATIENCE_S)

        assert (status.num_lines, status.num_ok, status.num_error, status.num_chunks) == (30, 30, 0, 4)
        assert [result.line for result in client.results(job)] == list(range(1, 31))
        assert client.verify(job).holds
