"""A Job and some calls on two workers, while Redis or the ledger is away for a minute; then every line is checked.

    python -m benchmarks.outage --seconds 60

For each kind of database three Jobs: in the middle of the first Redis is gone for so long, and comes back empty; of the
second the database, of the third both. PostgreSQL gets SIGKILL; what is away on SQLite is its lock, which somebody else
has all the time. Nothing else is touched, so that the workers have to wait, to come back and to go on by themselves.
Calls of many tokens are running when it begins.

The last line is one JSON object, with an entry for each outage. `lost`, `duplicated` and `wrong` count Results and must
be 0, as must `engines_replaced`; `leases_repeated`, which counts Chunks that were given out again though both workers
lived; `tokens_repeated`, by which `tokens_computed` by the engines, prefixes that they found in their caches left out,
exceed the `tokens_needed` by the answers and the blocks that preempted Sequences had begun; and `calls_lost`, those of
the `calls` that got no answer. `landed_meanwhile` are Results that landed during the outage, `first_result_s` is from
its end to the next one, `last_call_s` to the last call's answer.
"""

import argparse
import contextlib
import json
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from celery import Celery
from celery.exceptions import TimeoutError as NotYet
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError
from sqlalchemy import func, select

from benchmarks.checked_job import CheckedJob, say
from benchmarks.system import WORKERS, System, scratch_folder
from producer.client import Client
from protocol.celery_app import interactive_queue
from protocol.errors import DatabaseUnavailable
from storage.jobs import Job
from storage.ledger import Ledger
from storage.tables import chunks, results
from worker.engine.backends.sdpa import SDPABackend

LEASE_S = 30.0
#: Of the Job's Results, when the outage begins.
_BEGIN_AT = 0.3
_NUM_CALLS, _CALL_TOKENS = 16, 512
#: What has not come by then does not come any more.
_PATIENCE_S = 600.0


class Outage:
    """`targets` are "redis" and "ledger"."""

    def __init__(self, database: str, system: System, targets: tuple[str, ...], seconds: float) -> None:
        self._database, self._system, self._targets, self._seconds = database, system, targets, seconds

    @contextlib.contextmanager
    def happening(self) -> Iterator[None]:
        """For the length of the block."""
        services, names = self._system.services, []
        lock: sqlite3.Connection | None = None
        if "redis" in self._targets:
            names.append("redis")
        if "ledger" in self._targets and self._database == "postgresql":
            names.append("postgres")
        elif "ledger" in self._targets:
            lock = sqlite3.connect(self._system.folder / "ledger.db", isolation_level=None, timeout=30.0)
            lock.execute("BEGIN EXCLUSIVE")
        for name in names:
            services[name].kill(restart_s=self._seconds)
        try:
            yield
        finally:
            if lock is not None:
                lock.rollback()
                lock.close()


class Calls:
    """What a foreign app asks, and a thread that waits for one answer after the other."""

    def __init__(self, broker_url: str, model: str) -> None:
        self._app = Celery("foreign", broker=broker_url, backend=broker_url, set_as_current=False)
        self._queue = interactive_queue(model)
        self._asked: list[str] = []
        self._thread = threading.Thread(target=self._wait_for_all, daemon=True)
        self.answered_at: list[float] = []
        self.errors: list[str] = []
        self.tokens_needed = 0

    def send(self) -> None:
        for i in range(_NUM_CALLS):
            kwargs = {"max_tokens": _CALL_TOKENS, "ignore_eos": True, "temperature": 0}
            asked = self._app.send_task("millrace.generate", [f"def call_{i}(a):\n"], kwargs, queue=self._queue)
            self._asked.append(asked.id)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(_PATIENCE_S)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Of each worker, once all have answered."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OperationalError, RedisError):  # of connections that the outage has cut
                replies = self._app.control.inspect(timeout=2, limit=len(WORKERS)).stats() or {}
                if len(replies) == len(WORKERS):
                    return {name: reply["pool"] for name, reply in replies.items()}
        raise TimeoutError("the workers do not say what they have done")

    def _wait_for_all(self) -> None:
        for task_id in self._asked:
            try:
                usage = self._wait(task_id)["usage"]
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                continue
            if usage["completion_tokens"] == _CALL_TOKENS:
                self.answered_at.append(time.monotonic())
            self.tokens_needed += usage["prompt_tokens"] + usage["completion_tokens"] - 1

    def _wait(self, task_id: str) -> Any:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return AsyncResult(task_id, app=self._app).get(timeout=5)
            except (OperationalError, RedisError, RuntimeError, NotYet):
                # Celery's own patience with its backend is shorter than a minute: whoever wants to know asks on.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def measure(database: str, targets: tuple[str, ...], seconds: float, checked: CheckedJob) -> dict[str, Any]:
    with scratch_folder() as folder:
        system = System(database, folder, LEASE_S)
        outage = Outage(database, system, targets, seconds)
        with system.running() as ledger, Client(system.settings) as client:
            calls = Calls(system.settings.broker_url, system.settings.served_model)
            calls.stats()  # both are there
            job = checked.submit(client)
            total = client.status(job).num_requests
            _wait_for(ledger, job, int(_BEGIN_AT * total))
            calls.send()
            _until_calls_run(calls)
            engines = _engines(system)
            before = _num_results(ledger, job)
            if before >= total:
                raise ValueError(f"all {total} results were there before the outage: ask for more with --requests")
            with outage.happening():
                say(f"{before:5} of {total} results: {' and '.join(targets)} away on {database}")
                time.sleep(seconds)
                ended = time.monotonic()
                after = _num_results(ledger, job, before) if "ledger" not in targets else before
            first_s = _wait_for(ledger, job, after + 1, ended) if after < total else None
            client.wait(job, timeout_s=_PATIENCE_S)
            calls.join()
            problems = checked.check(client, job)
            stats = calls.stats()
            report: dict[str, Any] = {"database": database, "away": list(targets), "seconds": seconds}
            report |= {name: problems[name] for name in ("lost", "duplicated", "wrong")}
            report["engines_replaced"] = len(engines - _engines(system))
            report["leases_repeated"] = _num_leases(ledger) - _num_chunks(ledger)
            report["tokens_computed"] = sum(each["computed_tokens"] for each in stats.values())
            report["tokens_needed"] = _tokens_needed(ledger, job) + calls.tokens_needed
            report["preemptions"] = sum(each["preemptions"] for each in stats.values())
            allowed = report["tokens_needed"] + report["preemptions"] * SDPABackend.block_size
            report["tokens_repeated"] = max(report["tokens_computed"] - allowed, 0)
            report |= {"landed_meanwhile": after - before, "first_result_s": first_s and round(first_s, 2)}
            report |= {"calls": _NUM_CALLS, "calls_lost": _NUM_CALLS - len(calls.answered_at)}
            late = max(calls.answered_at, default=ended) - ended
            report["last_call_s"] = round(late, 2)
            for error in calls.errors[:3]:
                say(f"a call failed: {error}")
            say(json.dumps(report))
            return report


def _until_calls_run(calls: Calls) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while sum(each["open_calls"] for each in calls.stats().values()) < _NUM_CALLS - len(calls.answered_at):
        if time.monotonic() > deadline:
            raise TimeoutError("the calls are not taken up")


def _engines(system: System) -> set[int]:
    return {pid for name in WORKERS for pid in system.services[name].below("worker.engine.process")}


def _wait_for(ledger: Ledger, job: Job, num_results: int, since: float = 0.0) -> float:
    """Seconds from `since` until so many Results have landed."""
    deadline = time.monotonic() + _PATIENCE_S
    while _num_results(ledger, job) < num_results:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{num_results} results have not landed within {_PATIENCE_S:.0f} s")
        time.sleep(0.02)
    return time.monotonic() - since


def _num_results(ledger: Ledger, job: Job, otherwise: int = 0) -> int:
    statement = select(func.sum(chunks.c.num_ok + chunks.c.num_error)).where(chunks.c.job_id == job.id)
    try:
        return ledger.read(lambda connection: connection.scalar(statement)) or 0
    except DatabaseUnavailable:
        return otherwise


def _num_leases(ledger: Ledger) -> int:
    return ledger.read(lambda connection: connection.scalar(select(func.sum(chunks.c.attempt)))) or 0


def _num_chunks(ledger: Ledger) -> int:
    return ledger.read(lambda connection: connection.scalar(select(func.count()).select_from(chunks))) or 0


def _tokens_needed(ledger: Ledger, job: Job) -> int:
    """What one pass over each prompt and its answer computes: the last token's is never."""
    of_each = results.c.prompt_tokens + results.c.completion_tokens - 1
    statement = select(func.sum(of_each)).where(results.c.job_id == job.id, ~results.c.is_cached)
    return ledger.read(lambda connection: connection.scalar(statement)) or 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    parser.add_argument("--away", nargs="+", default=["redis", "ledger", "both"], choices=["redis", "ledger", "both"])
    arguments = parser.parse_args()
    try:
        checked = CheckedJob(arguments.requests)
    except ValueError as error:
        parser.error(str(error))
    outages = [
        measure(database, ("redis", "ledger") if away == "both" else (away,), arguments.seconds, checked)
        for database in arguments.databases
        for away in arguments.away
    ]
    wrong = ("lost", "duplicated", "wrong", "engines_replaced", "leases_repeated", "tokens_repeated", "calls_lost")
    report = {name: sum(outage[name] for outage in outages) for name in wrong}
    print(json.dumps({"outages": outages, "requests": arguments.requests} | report))
    return 1 if any(report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
