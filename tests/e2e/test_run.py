"""`millrace run` with real processes: what is killed in mid-job costs time and nothing else."""

import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from protocol.errors import ConfigurationError
from storage.jobs import job_status, list_jobs
from storage.ledger import Ledger
from storage.results import read_results
from tests.e2e.conftest import Running, Start
from tests.e2e.mixed_job import MixedJob, write_mixed_job
from tests.processes import Watched, command_line

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def job(tmp_path: Path) -> MixedJob:
    return write_mixed_job(tmp_path / "prompts.jsonl")


@pytest.fixture
def run(start: Start, job: MixedJob, model: Path) -> Callable[[], Running]:
    def run() -> Running:
        options = ["--max-tokens", "40", "--temperature", "0"]
        return start("run", "prompts.jsonl", "-o", "out/results.jsonl", "--model", model, *options)

    return run


class State:
    """The run's ledger, seen from outside."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(f"sqlite:///{folder}/.millrace/ledger.db")
        self._is_there = False

    def job_id(self) -> str:
        (job,) = list_jobs(self.ledger, "default", 10)
        return job.id

    def num_results(self) -> int:
        status = job_status(self.ledger, self.job_id())
        return status.num_ok + status.num_error

    def has_results(self, number: int) -> bool:
        if not self._is_there:
            try:
                self.ledger.check_schema()
            except ConfigurationError:
                return False
            self._is_there = bool(list_jobs(self.ledger, "default", 1))
        return self._is_there and self.num_results() >= number


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path)
    yield state
    state.ledger.close()


def kill(running: Running, marker: str) -> None:
    """SIGKILL the process below `running` with this in its command line; guards name their command's too."""
    pids = [pid for pid in running.below() if marker in command_line(pid) and "guard.py" not in command_line(pid)]
    with Watched(pids) as found:
        found.kill()
        assert len(pids) == 1, pids
        assert found.left_after(10) == []


def test_run_answers_every_line_once_though_engine_redis_and_worker_are_killed(
    run: Callable[[], Running], job: MixedJob, state: State, tmp_path: Path
) -> None:
    running = run()
    for threshold, marker in ((60, "worker.engine"), (160, "redis-server"), (260, "cli.main worker")):
        running.wait_until(partial(state.has_results, threshold))
        kill(running, marker)
    code, stdout, stderr = running.finish()

    assert code == 0, stderr
    rows = job.check(tmp_path / "out" / "results.jsonl")
    assert "the Redis died and is started again" in stderr
    assert "the worker died and is started again" in stderr
    assert f"{len(rows)} results: {len(rows) - 8} answers (50 known already), 8 errors (prompt_too_long 3" in stdout
    assert running.leaves_no_process()


def test_second_run_computes_nothing_and_starts_nothing(
    run: Callable[[], Running], job: MixedJob, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "results.jsonl"
    assert run().finish()[0] == 0
    first = output.read_bytes()
    output.unlink()
    log = (tmp_path / ".millrace" / "worker.log").read_bytes()

    again = run()
    code, stdout, stderr = again.finish()

    assert (code, stderr) == (0, "")
    assert "nothing was computed" in stdout
    assert output.read_bytes() == first
    job.check(output)
    assert (tmp_path / ".millrace" / "worker.log").read_bytes() == log


def test_killed_run_leaves_no_process_and_goes_on_where_it_was(
    run: Callable[[], Running], job: MixedJob, state: State, tmp_path: Path
) -> None:
    killed = run()
    killed.wait_until(partial(state.has_results, 150))
    killed.below()
    killed.process.kill()
    killed.process.wait()

    assert killed.leaves_no_process()
    assert not (tmp_path / "out" / "results.jsonl").exists()
    kept = read_results(state.ledger, state.job_id())
    assert len(kept) >= 150

    code, _, stderr = run().finish()

    assert code == 0, stderr
    job.check(tmp_path / "out" / "results.jsonl")
    lines = {(result.line, result.sample): result for result in read_results(state.ledger, state.job_id())}
    assert [lines[result.line, result.sample] for result in kept] == kept


def test_ctrl_c_stops_everything_in_order_and_says_how_to_go_on(
    run: Callable[[], Running], state: State, tmp_path: Path
) -> None:
    running = run()
    running.wait_until(partial(state.has_results, 60))

    running.process.send_signal(signal.SIGINT)
    code, stdout, stderr = running.finish()

    assert code == 130
    assert stdout == ""
    num_results = state.num_results()
    assert stderr.endswith(f"stopped; {num_results:,} results are kept, and the same command goes on from there\n")
    assert running.leaves_no_process()
    status = job_status(state.ledger, state.job_id())
    assert (status.num_requests_leased, status.job.state) == (0, "running")
    assert "worker ended" in (tmp_path / ".millrace" / "worker.log").read_text()


def test_second_run_on_the_same_state_is_refused(run: Callable[[], Running], tmp_path: Path) -> None:
    first = run()
    first.wait_until(lambda: (tmp_path / ".millrace" / "lock").exists() and first.below())

    code, stdout, stderr = run().finish()

    assert (code, stdout) == (1, "")
    assert stderr.startswith(f"Error: another run (process {first.process.pid}) holds the state folder")
    assert stderr.count("\n") == 1


def test_model_without_a_tokenizer_is_reported_in_one_line(
    start: Start, job: MixedJob, model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "model.safetensors"):
        (broken / name).write_bytes((model / name).read_bytes())

    running = start("run", "prompts.jsonl", "-o", "results.jsonl", "--model", broken)
    code, stdout, stderr = running.finish()

    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1].startswith(f"Error: {broken} has no tokenizer that can be loaded")
    assert running.leaves_no_process()
