"""A Job on two workers, while what it runs on is killed again and again; then every line is checked.

    python -m benchmarks.chaos --rounds 1 --seed 0

Each round submits the Job anew, once on SQLite and once on PostgreSQL. At random moments, by the seed, one of these
gets SIGKILL: a worker, an engine process, Redis with all that is in it, the whole of PostgreSQL. What was killed is
started again after a moment, as a service manager would; nothing else helps. For longer outages see benchmarks.outage.

The last line is one JSON object. `lost`, `duplicated` and `wrong` count Results, and must be 0; recovery is the time
from a kill to the next Result that lands.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from benchmarks.checked_job import CheckedJob, say
from benchmarks.system import System, scratch_folder
from producer.client import Client
from protocol.errors import DatabaseUnavailable
from storage.ledger import Ledger
from storage.tables import chunks

#: A dead worker holds its Chunks this long.
LEASE_S = 3.0
#: Seconds between two kills, and until what was killed is started again.
GAPS_S = (1.0, 5.0)
RESTART_S = (0.0, 1.5)
#: Kills without a Result after them: with more, nothing would run long enough to be killed.
MAX_DOWN = 3
#: A round that has not ended by then has lost something.
PATIENCE_S = 1800.0


class Round:
    """One Job on one kind of database."""

    def __init__(self, database: str, folder: Path, checked: CheckedJob, rng: random.Random) -> None:
        self._rng = rng
        self._checked = checked
        self._system = System(database, folder, LEASE_S)
        self.counts: Counter[str] = Counter()
        self.recoveries: list[float] = []

    def run(self) -> None:
        with self._system.running() as ledger, Client(self._system.settings) as client:
            job = self._checked.submit(client)
            self._disturb(client, job.id)
            problems = self._checked.check(client, job)
            self.counts += problems
            say(f"{self.counts['kills']} kills, {num_leases(ledger)} leases, problems: {problems.total()}")

    def _disturb(self, client: Client, job_id: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        killed_at: list[float] = []
        num_results = 0
        next_kill = time.monotonic() + self._rng.uniform(*GAPS_S)
        while time.monotonic() < deadline:
            try:
                status = client.status(job_id)
            except DatabaseUnavailable:
                time.sleep(0.05)
                status = None
            now = time.monotonic()
            if status is not None and status.num_ok + status.num_error > num_results:
                num_results = status.num_ok + status.num_error
                self.recoveries += [now - at for at in killed_at]
                killed_at.clear()
            if status is not None and status.job.state == "finished":
                return
            if now >= next_kill and len(killed_at) < MAX_DOWN and (target := self._kill()):
                killed_at.append(now)
                next_kill = now + self._rng.uniform(*GAPS_S)
                say(f"{num_results:5} results: killed {target}")
            time.sleep(0.05)
        say(f"the Job has not ended within {PATIENCE_S:.0f} s")

    def _kill(self) -> str | None:
        services = self._system.services
        name = self._rng.choice([*services, "engine 0", "engine 1"])
        restart_s = self._rng.uniform(*RESTART_S)
        if name.startswith("engine"):
            is_killed = services[name.replace("engine", "worker")].kill("worker.engine.process")
        else:
            is_killed = services[name].kill(restart_s=restart_s)
        if is_killed:
            self.counts["kills"] += 1
            self.counts[name.split()[0]] += 1
        return name if is_killed else None


def num_leases(ledger: Ledger) -> int:
    """In all, of all Chunks."""
    return ledger.read(lambda connection: connection.scalar(select(func.sum(chunks.c.attempt)))) or 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        checked = CheckedJob(arguments.requests)
    except ValueError as error:
        parser.error(str(error))
    say(f"answers of an undisturbed engine after {time.monotonic() - started:.0f} s")
    rng = random.Random(arguments.seed)
    counts: Counter[str] = Counter()
    recoveries: list[float] = []
    for number in range(arguments.rounds):
        for database in arguments.databases:
            say(f"round {number + 1} on {database}, after {time.monotonic() - started:.0f} s")
            with scratch_folder() as folder:
                one = Round(database, folder, checked, rng)
                one.run()
            counts += one.counts
            recoveries += one.recoveries
    report: dict[str, Any] = {"rounds": arguments.rounds * len(arguments.databases)}
    report |= {name: counts[name] for name in ("kills", "lost", "duplicated", "wrong")}
    report["recovery_p50_s"] = round(statistics.median(recoveries), 2) if recoveries else None
    report["recovery_max_s"] = round(max(recoveries), 2) if recoveries else None
    kinds = {name: counts[name] for name in ("worker", "engine", "redis", "postgres")}
    report["near_ties_left_out"] = checked.num_ties
    report["seconds"] = round(time.monotonic() - started)
    print(json.dumps(report | {"killed": kinds, "requests": arguments.requests, "seed": arguments.seed}))
    return 1 if counts["lost"] + counts["duplicated"] + counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
