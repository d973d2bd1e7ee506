import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from protocol.errors import BrokerUnavailable, WorkerDied
from protocol.requests import Request
from protocol.sampling import SamplingParams
from protocol.settings import EngineSettings, Settings, load_settings
from storage.jobs import append_chunk, job_status, open_job
from storage.ledger import Ledger
from tests.processes import Watched, descendants
from tests.storage.samples import new_lease
from worker.local import redis_server
from worker.local.state import StateFolder
from worker.local.system import LocalSystem, settings_environ

SETTINGS = Settings(model_name="tiny", engine=EngineSettings(model="/a/tiny", kv_tokens=64))
STAYS = "echo started >> {folder}/starts; while :; do sleep 0.05; done"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[StateFolder]:
    with StateFolder(tmp_path / "state") as folder:
        yield folder


Make = Callable[..., LocalSystem]


@pytest.fixture
def make(folder: StateFolder, tmp_path: Path) -> Make:
    def make(script: str, **environ: str) -> LocalSystem:
        command = ["sh", "-c", script.format(folder=tmp_path)]
        return LocalSystem(folder, SETTINGS, command, {"PATH": os.environ["PATH"], **environ})

    return make


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def num_starts(tmp_path: Path) -> int:
    starts = tmp_path / "starts"
    return len(starts.read_text().splitlines()) if starts.exists() else 0


def kill_worker(system: LocalSystem) -> None:
    assert system._worker is not None
    with Watched([system._worker.pid]) as guard:
        guard.kill()
        assert guard.left_after(20) == []


def test_worker_gets_the_settings_of_this_system_by_its_environment_and_no_others(make: Make, tmp_path: Path) -> None:
    script = (
        "cat /proc/$$/cmdline > {folder}/cmdline; env > {folder}/env.part; mv {folder}/env.part {folder}/env; sleep 60"
    )
    with make(script, MILLRACE_TENANT="stray") as system:
        wait_until((tmp_path / "env").exists)
        environ = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())

        assert load_settings(environ=environ) == system.settings
        assert environ["MILLRACE_CONFIG"] == "/dev/null"
        assert "MILLRACE_TENANT" in environ
        assert system.settings.tenant == "default"
        password = redis.Redis.from_url(system.settings.broker_url).connection_pool.connection_kwargs["password"]
        assert password not in (tmp_path / "cmdline").read_text()


def test_settings_survive_the_way_through_the_environment() -> None:
    settings = Settings(
        model_name="my model", chunk_requests=7, lease_seconds=1.5, engine=EngineSettings(num_threads=2, model="x y")
    )

    assert load_settings(environ=settings_environ(settings)) == settings


def test_everything_has_ended_afterwards(make: Make, folder: StateFolder, tmp_path: Path) -> None:
    with make("trap 'echo orderly > {folder}/end; exit' TERM; " + STAYS) as system:
        wait_until(lambda: num_starts(tmp_path) == 1)
        system.supervise(0)
        url = system.settings.broker_url

    assert (tmp_path / "end").read_text() == "orderly\n"
    with redis.Redis.from_url(url) as client, pytest.raises(redis.ConnectionError):
        client.ping()


def test_killed_worker_is_started_again_and_its_leases_are_free(
    make: Make, folder: StateFolder, tmp_path: Path
) -> None:
    with make(STAYS) as system:
        wait_until(lambda: num_starts(tmp_path) == 1)
        ledger = Ledger(folder.database_url)
        job, _ = open_job(ledger, tenant="default", identity="i", model="tiny", params=SamplingParams())
        chunk_id = append_chunk(
            ledger, job.id, first_line=1, last_line=1, requests=[Request(line=1, prompt="a")], failures=[]
        )
        assert chunk_id is not None
        new_lease(ledger, chunk_id, "the worker", 1000)
        assert job_status(ledger, job.id).num_requests_waiting == 0

        kill_worker(system)
        system.supervise(0)

        assert job_status(ledger, job.id).num_requests_waiting == 1
        wait_until(lambda: num_starts(tmp_path) == 2)
        ledger.close()


def test_leases_of_an_earlier_run_are_free_at_once(make: Make, folder: StateFolder) -> None:
    ledger = Ledger(folder.database_url)
    ledger.migrate()
    job, _ = open_job(ledger, tenant="default", identity="i", model="tiny", params=SamplingParams())
    chunk_id = append_chunk(
        ledger, job.id, first_line=1, last_line=1, requests=[Request(line=1, prompt="a")], failures=[]
    )
    assert chunk_id is not None
    new_lease(ledger, chunk_id, "who was killed", 1000)

    with make(STAYS):
        assert job_status(ledger, job.id).num_requests_waiting == 1
    ledger.close()


def test_worker_that_keeps_dying_without_progress_is_given_up(make: Make, tmp_path: Path) -> None:
    with make(STAYS) as system:
        system.supervise(0)
        for _ in range(2):
            kill_worker(system)
            system.supervise(0)
        kill_worker(system)
        with pytest.raises(WorkerDied, match="the worker died 3 times without a new result in between"):
            system.supervise(0)


def test_progress_between_deaths_keeps_it_going(make: Make) -> None:
    with make(STAYS) as system:
        for num_results in range(5):
            kill_worker(system)
            system.supervise(num_results)


def test_worker_that_cannot_start_is_reported_by_its_own_error_line(make: Make) -> None:
    with make("echo some log >&2; echo 'Error: no such model' >&2; echo more >&2; exit 1") as system:
        wait_until(lambda: system._worker is not None and system._worker.poll() is not None)
        with pytest.raises(WorkerDied, match=r"^no such model$"):
            system.supervise(17)


def test_worker_that_ends_without_a_word_is_reported_with_its_log(make: Make, folder: StateFolder) -> None:
    with make("echo Traceback; echo KeyError; exit 1") as system:
        wait_until(lambda: system._worker is not None and system._worker.poll() is not None)
        with pytest.raises(WorkerDied, match=rf"^KeyError \(exit code 1, see {folder.worker_log}\)$"):
            system.supervise(0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_workers_complaint_is_passed_on_once_while_there_is_no_new_result(
    folder: StateFolder, caplog: pytest.LogCaptureFixture
) -> None:
    line = "2030-01-02 03:04:05,678 WARNING millrace.worker: try {number}: database or disk is full\n"
    clock = Clock()
    system = LocalSystem(folder, SETTINGS, ["sleep", "60"], {"PATH": os.environ["PATH"]}, clock)

    def complain(number: int) -> None:
        with folder.worker_log.open("a") as log:
            log.write(line.format(number=number))

    with system:
        complain(1)
        system.supervise(0)
        assert caplog.messages == []

        for number in (2, 3):
            clock.now += 10
            complain(number)
            system.supervise(0)
        said = "no new result for some time; the worker says: try 2: database or disk is full"
        assert caplog.messages == [said]

        system.supervise(1)
        clock.now += 10
        system.supervise(1)
        assert caplog.messages == [said, said.replace("2", "3")]


def test_a_young_complaint_is_not_passed_on_as_it_may_be_the_last_words(
    folder: StateFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that cannot start logs why, ends a moment later with the same words, and both were told."""
    clock = Clock()
    with LocalSystem(folder, SETTINGS, ["sleep", "60"], {"PATH": os.environ["PATH"]}, clock) as system:
        clock.now += 10
        with folder.worker_log.open("a") as log:
            log.write("2030-01-02 03:04:05,678 ERROR millrace.engine: no such device\n")
        for _ in range(2):
            system.supervise(0)
            clock.now += 2
        assert caplog.messages == []

        clock.now += 2
        system.supervise(0)
        assert caplog.messages == ["no new result for some time; the worker says: no such device"]


def test_full_disk_is_told_though_nothing_can_be_logged_there(
    folder: StateFolder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    with LocalSystem(folder, SETTINGS, ["sleep", "60"], {"PATH": os.environ["PATH"]}, clock) as system:
        monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
        for _ in range(3):
            system.supervise(0)
            clock.now += 10

    assert caplog.messages == [f"the disk of the state folder {folder.path} is full"]


def test_worker_is_ready_when_it_has_said_so_and_not_after_its_death(make: Make, tmp_path: Path) -> None:
    ready = "echo '2030-01-02 03:04:05,678 INFO millrace.worker: engine ready: pid 1' >&2; "
    with make("test -e {folder}/starts || " + ready + STAYS) as system:
        seen = [system.is_worker_ready]
        wait_until(lambda: num_starts(tmp_path) == 1)
        system.supervise(0)
        seen.append(system.is_worker_ready)
        kill_worker(system)
        system.supervise(0)
        seen.append(system.is_worker_ready)

    assert seen == [False, True, False]


def test_killed_redis_comes_back_on_the_same_address(make: Make) -> None:
    with make(STAYS) as system:
        url = system.settings.broker_url
        with redis.Redis.from_url(url) as client:
            os.kill(client.info("server")["process_id"], signal.SIGKILL)
        wait_until(lambda: not system._redis.is_running)

        system.supervise(0)

        assert system.settings.broker_url == url
        with redis.Redis.from_url(url) as client:
            assert client.ping()


def test_nothing_is_left_when_redis_does_not_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "find_redis_server", lambda: "/bin/false")

    with pytest.raises(BrokerUnavailable), make(STAYS):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killing_the_run_leaves_no_process(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys, signal\n"
        "from protocol.settings import Settings\n"
        "from worker.local.state import StateFolder\n"
        "from worker.local.system import LocalSystem\n"
        "with (\n"
        "    StateFolder(pathlib.Path(sys.argv[1])) as state,\n"
        "    LocalSystem(state, Settings(), ['sleep', '1000'], os.environ),\n"
        "):\n"
        "    signal.pause()\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[2])
    try:
        # Two guards, Redis and the worker.
        wait_until(lambda: len(descendants(run.pid)) == 4)
        below = Watched(descendants(run.pid))
    finally:
        run.kill()
        run.wait()

    with below:
        assert below.left_after(20) == []
