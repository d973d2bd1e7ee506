"""A Job on two workers, while what it runs on is killed again and again; then every line is checked.

    python -m benchmarks.chaos --rounds 1 --seed 0

Each round submits the Job anew, once on SQLite and once on PostgreSQL. At random moments, by the seed, one of these
gets SIGKILL: a worker, an engine process, Redis with all that is in it, the whole of PostgreSQL. What was killed is
started again after a moment, as a service manager would; nothing else helps. The answers are compared with those of
engines that have one Sequence at a time and that nobody disturbs, computed once for a workload and kept under out/.
Prompts with two right answers (a near-tie of the best tokens, see benchmarks.sequential_answers) are left out: which of
the two comes is up to what else is in a step, not to what is killed.

The last line is one JSON object. `lost`, `duplicated` and `wrong` count Results, and must be 0; recovery is the time
from a kill to the next Result that lands.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import text as sql

from benchmarks.queue_servers import free_port, postgres_binaries
from benchmarks.sequential_answers import sequential_answers
from producer.client import Client
from protocol.errors import DatabaseUnavailable
from protocol.sampling import SamplingParams
from protocol.settings import EngineSettings, Settings
from storage.ledger import Ledger
from worker.local.redis_server import find_redis_server

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "millrace-tiny"
MAX_TOKENS = 8
#: Prompts beyond those asked for, to make up for those with two right answers.
NUM_SPARE = 20
#: A dead worker holds its Chunks this long.
LEASE_S = 3.0
#: Seconds between two kills, and until what was killed is started again.
GAPS_S = (1.0, 5.0)
RESTART_S = (0.0, 1.5)
#: Kills without a Result after them: with more, nothing would run long enough to be killed.
MAX_DOWN = 3
#: A round that has not ended by then has lost something.
PATIENCE_S = 1800.0
_PR_SET_PDEATHSIG = 1


class Service:
    """A process that is started again whenever it has ended, with all that is below it killed at once."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, environ: dict[str, str], user: str | None = None
    ) -> None:
        self._command, self._log, self._environ, self._user = [str(part) for part in command], log, environ, user
        self._process: subprocess.Popen[bytes] | None = None
        self._start_at: float | None = 0.0

    def tend(self) -> None:
        """Start it if it is its time."""
        if self._process is not None and self._process.poll() is not None and self._start_at is None:
            self._start_at = time.monotonic()
        if self._start_at is not None and time.monotonic() >= self._start_at:
            self._start_at = None
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environ,
                    user=self._user, group=self._user, cwd=self._log.parent, start_new_session=True,
                    preexec_fn=lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
                )  # fmt: skip

    def kill(self, marker: str | None = None, restart_s: float = 0.0) -> bool:
        """SIGKILL it with its children, or one below it with this in its command line; whether there was one."""
        if self._process is None or self._process.poll() is not None:
            return False
        below = _descendants(self._process.pid)
        if marker is not None:
            below = [pid for pid in below if marker in _command_line(pid)]
            for pid in below:
                _kill(pid)
            return bool(below)
        self._start_at = time.monotonic() + restart_s
        # A worker's engine sees its parent's death by itself; the servers' own children are killed with them.
        for pid in [self._process.pid, *(below if "worker" not in self._command else [])]:
            _kill(pid)
        self._process.wait()
        return True


class Round:
    """One Job on one kind of database."""

    def __init__(self, database: str, folder: Path, workload: list[tuple[str, str]], rng: random.Random) -> None:
        self._folder, self._rng = folder, rng
        self._prompts, self._expected = [prompt for prompt, _ in workload], [text for _, text in workload]
        self.counts: Counter[str] = Counter()
        self.recoveries: list[float] = []
        self._services: dict[str, Service] = {}
        password, port = secrets.token_hex(8), free_port()
        redis = [find_redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password]
        self._services["redis"] = Service(
            [*redis, "--save", "", "--dir", folder], folder / "redis.log", dict(os.environ)
        )
        url = f"sqlite:///{folder}/ledger.db"
        if database == "postgresql":
            url = self._add_postgres()
        engine = EngineSettings(model=str(MODEL), max_num_seqs=32, num_threads=1)
        self._settings = Settings(
            broker_url=f"redis://:{password}@127.0.0.1:{port}/0", database_url=url, engine=engine, lease_seconds=LEASE_S
        )

    def run(self) -> None:
        self._tend()
        ledger = Ledger(self._settings.database_url)
        _until(lambda: ledger.migrate())
        for number in range(2):
            self._services[f"worker {number}"] = Service(
                [sys.executable, "-m", "cli.main", "worker"], self._folder / f"worker-{number}.log", self._environ()
            )
        stop = threading.Event()
        tending = threading.Thread(target=self._tend_until, args=(stop,))
        tending.start()
        try:
            with Client(self._settings) as client:
                lines = [{"prompt": prompt} for prompt in self._prompts]
                job = client.submit(lines, name="chaos", params=SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0))
                self._disturb(client, job.id)
                self._check(client, ledger, job.id)
        finally:
            stop.set()
            tending.join()
            for service in self._services.values():
                service.kill(restart_s=1e9)
            ledger.close()

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
        names = [*self._services, "engine 0", "engine 1"]
        name = self._rng.choice(names)
        restart_s = self._rng.uniform(*RESTART_S)
        if name.startswith("engine"):
            is_killed = self._services[name.replace("engine", "worker")].kill("worker.engine.process")
        else:
            is_killed = self._services[name].kill(restart_s=restart_s)
        if is_killed:
            self.counts["kills"] += 1
            self.counts[name.split()[0]] += 1
        return name if is_killed else None

    def _check(self, client: Client, ledger: Ledger, job_id: str) -> None:
        found = {}
        num_rows = 0
        for result in client.results(job_id, wait=False):
            num_rows += 1
            found[result.line] = result
        self.counts["lost"] += len(self._expected) - len(found)
        self.counts["duplicated"] += num_rows - len(found)
        for line, expected in enumerate(self._expected, start=1):
            row = found.get(line)
            if row is not None and (row.answer is None or row.answer.text != expected):
                self.counts["wrong"] += 1
                say(f"line {line} is wrong: {row.failure or row.answer}, expected {expected!r}")
        verification = client.verify(job_id)
        if not verification.holds:
            self.counts["wrong"] += 1
            say(f"the Job does not verify: {verification}")
        num_attempts = ledger.read(
            lambda connection: connection.execute(sql("SELECT sum(attempt) FROM chunks")).scalar()
        )
        say(f"{num_rows} results, {self.counts['kills']} kills, {num_attempts} leases, problems: {self._problems()}")

    def _problems(self) -> int:
        return self.counts["lost"] + self.counts["duplicated"] + self.counts["wrong"]

    def _tend(self) -> None:
        for service in list(self._services.values()):
            service.tend()

    def _tend_until(self, stop: threading.Event) -> None:
        while not stop.wait(0.02):
            self._tend()

    def _environ(self) -> dict[str, str]:
        from worker.local.system import settings_environ

        plain = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        return {**plain, **settings_environ(self._settings), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def _add_postgres(self) -> str:
        binaries, data = postgres_binaries(), self._folder / "postgres"
        user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
        data.mkdir()
        if user is not None:
            for path in (self._folder, data):
                shutil.chown(path, user, user)
        initdb: list[str | Path] = [binaries / "initdb", "-D", data / "data", "-U", "postgres", "-E", "UTF8"]
        initdb += ["--no-locale", "-A", "trust"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, user=user, group=user, cwd=data)
        port = free_port()
        command: list[str | Path] = [binaries / "postgres", "-D", data / "data", "-k", data, "-p", str(port)]
        self._services["postgres"] = Service(command, data / "log", dict(os.environ), user)
        return f"postgresql+psycopg://postgres@/postgres?host={data}&port={port}"


def make_prompts(num: int) -> list[str]:
    """Beginnings of functions, every tenth the same as an earlier one."""
    verbs = ("read", "write", "count", "merge", "split", "find", "load", "sort", "check", "make")
    nouns = ("lines", "items", "keys", "words", "files", "rows", "nodes")
    names = (f"{verbs[i % 10]}_{nouns[i % 7]}_{i}" for i in range(num))
    prompts = [f"def {name}({'a, ' * (i % 5)}b):\n" for i, name in enumerate(names)]
    return [prompts[i // 2] if i % 10 == 9 else prompt for i, prompt in enumerate(prompts)]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="millrace-chaos-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _until(act: Any) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            act()
            return
        except DatabaseUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, left = [], [pid]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    arguments = parser.parse_args()
    prompts = make_prompts(arguments.requests + NUM_SPARE)
    started = time.monotonic()
    answers = sequential_answers(MODEL, prompts, MAX_TOKENS)
    workload = [(p, answer.text) for p, answer in zip(prompts, answers, strict=True) if not answer.is_near_tie]
    num_ties = len(prompts) - len(workload)
    say(f"{len(prompts)} answers of an undisturbed engine after {time.monotonic() - started:.0f} s")
    say(f"{num_ties} have a near-tie and are left out")
    if len(workload) < arguments.requests:
        parser.error(
            f"{num_ties} of {len(prompts)} prompts have a near-tie: more than the {NUM_SPARE} there are to spare"
        )
    del workload[arguments.requests :]
    rng = random.Random(arguments.seed)
    counts: Counter[str] = Counter()
    recoveries: list[float] = []
    for number in range(arguments.rounds):
        for database in arguments.databases:
            say(f"round {number + 1} on {database}, after {time.monotonic() - started:.0f} s")
            with _folder() as folder:
                one = Round(database, folder, workload, rng)
                one.run()
            counts += one.counts
            recoveries += one.recoveries
    report: dict[str, Any] = {"rounds": arguments.rounds * len(arguments.databases)}
    report |= {name: counts[name] for name in ("kills", "lost", "duplicated", "wrong")}
    report["recovery_p50_s"] = round(statistics.median(recoveries), 2) if recoveries else None
    report["recovery_max_s"] = round(max(recoveries), 2) if recoveries else None
    kinds = {name: counts[name] for name in ("worker", "engine", "redis", "postgres")}
    report["near_ties_left_out"] = num_ties
    report["seconds"] = round(time.monotonic() - started)
    print(json.dumps(report | {"killed": kinds, "requests": arguments.requests, "seed": arguments.seed}))
    return 1 if counts["lost"] + counts["duplicated"] + counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
