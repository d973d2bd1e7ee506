"""A worker killed at every step of a Chunk's life: another one, asleep meanwhile, finishes the Job, every line once.

The engine answers everything at once, so that nothing here depends on a model.
"""

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
from worker.local.system import settings_environ

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills workers that have children")

#: Each on one kind of database, since starting a worker takes seconds; the ledger's own tests try both.
POINTS = [
    *[("sqlite", point) for point in ("claimed", "prepared", "before commit", "committed")],
    *[("postgresql", point) for point in ("accepted", "tokens", "within commit", "job closed")],
]


class Workers:
    """Workers over one Redis and one database."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self._folder = settings, folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, fault: str = "") -> "subprocess.Popen[bytes]":
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        environ = {**plain, **settings_environ(self.settings), FAULT_VARIABLE: fault, "PYTHONPATH": str(ROOT)}
        with (self._folder / f"worker-{len(self.started)}.log").open("wb") as log:
            command = [sys.executable, "-m", "benchmarks.null_engine"]
            self.started.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log, cwd=self._folder))
        return self.started[-1]


@pytest.fixture(scope="module")
def workers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis_server: str
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
    workers = Workers(settings, folder)
    with closing(Ledger(url)) as ledger:
        ledger.migrate()
    workers.start()
    yield workers
    for worker in workers.started:
        worker.kill()
        worker.wait()


@pytest.mark.parametrize(("workers", "point"), POINTS, indirect=["workers"])
def test_a_worker_killed_there_loses_and_repeats_nothing(workers: Workers, point: str) -> None:
    other = workers.started[0]
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
