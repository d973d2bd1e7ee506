"""A worker as a process, and all that a foreign Celery app in another project sees of it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Signature
from celery.events import EventReceiver

from storage.ledger import Ledger
from tests.e2e.conftest import PATIENCE_S, ROOT
from tests.processes import descendants

#: In every prompt; also what the model says begins with it, since its answers are as random as its weights.
MARKER = "xyzzy-plugh"
LEASE_S = 3
#: A name the worker serves beside its own.
TWIN = "twin"


def wait_until(is_so: Callable[[], Any], what: str = "it") -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.02)
    return found


class Beside:
    """Processes of the console script over one Redis and one SQLite ledger, each logging to a file of its own."""

    def __init__(self, folder: Path, redis_url: str, model: Path) -> None:
        self.folder = folder
        self.redis_url = redis_url
        self.database_url = f"sqlite:///{folder}/ledger.db"
        self._settings = {
            "BROKER_URL": redis_url,
            "DATABASE_URL": self.database_url,
            "ENGINE_MODEL": str(model),
            "ENGINE_NUM_THREADS": "1",
            "ENGINE_MAX_NUM_SEQS": "16",
            "LEASE_SECONDS": str(LEASE_S),
            "LOG_LEVEL": "DEBUG",
            "ALSO_SERVES": TWIN,
        }
        self._started: list[subprocess.Popen[bytes]] = []
        ledger = Ledger(self.database_url)
        ledger.migrate()
        ledger.close()

    def start(self, *arguments: str, log: str, **settings: str) -> subprocess.Popen[bytes]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        given = {f"MILLRACE_{name.upper()}": value for name, value in {**self._settings, **settings}.items()}
        with self.log(log).open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "cli.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self.folder,
                env={**plain, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **given},
            )
        self._started.append(process)
        return process

    def start_foreign_worker(self, module: str) -> None:
        """A worker of another project, whose tasks are in this module."""
        (self.folder / "theirs.py").write_text(module)
        with self.log("theirs").open("wb") as file:
            command = [sys.executable, "-m", "celery", "-A", "theirs", "worker", "-P", "solo"]
            self._started.append(subprocess.Popen(command, stdout=file, stderr=file, cwd=self.folder))

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start_worker(self, log: str = "worker") -> subprocess.Popen[bytes]:
        """Returns when it is ready."""
        process = self.start("worker", log=log)
        wait_until(lambda: process.poll() is not None or " ready." in self.log(log).read_text(), "a worker's start")
        assert process.poll() is None, self.log(log).read_text()
        return process

    def engines(self) -> list[int]:
        """The engine processes of all that was started and runs."""
        below = [pid for process in self._started for pid in descendants(process.pid)]
        return [pid for pid in below if b"worker.engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def stop_last(self) -> None:
        """Of what was started."""
        process = self._started.pop()
        process.terminate()
        process.wait(PATIENCE_S)

    def stop_all(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self._started:
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Watched:
    """Every event of every worker, as Flower gets them."""

    def __init__(self, app: Celery) -> None:
        self.events: list[dict[str, Any]] = []
        self._app = app
        self._is_ready = threading.Event()
        self._receiver: EventReceiver | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watched":
        self._thread.start()
        assert self._is_ready.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._receiver is not None
        self._receiver.should_stop = True
        self._thread.join(PATIENCE_S)

    def of(self, task_id: str) -> list[dict[str, Any]]:
        return [event for event in list(self.events) if event.get("uuid") == task_id]

    def types_of(self, task_id: str) -> list[str]:
        return [event["type"] for event in self.of(task_id)]

    def _run(self) -> None:
        with self._app.connection() as connection:
            self._receiver = EventReceiver(connection, handlers={"*": self.events.append}, app=self._app)
            with contextlib.suppress(TimeoutError):
                for _ in self._receiver.consume(limit=None, timeout=None, wakeup=True):
                    self._is_ready.set()


def foreign_app(redis_url: str) -> Celery:
    """As somebody else's project has it: a broker, a backend, and no other setting."""
    return Celery("foreign", broker=redis_url, backend=redis_url, set_as_current=False)


def generate(app: Celery, prompt: str | None = None, /, **parameters: Any) -> Signature:
    """Greedy, eight tokens."""
    args = () if prompt is None else (f"{MARKER} {prompt}",)
    return app.signature("millrace.generate", args=args, kwargs={"max_tokens": 8, "temperature": 0, **parameters})


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory, redis_server: str, model: Path) -> Iterator[Beside]:
    """An empty Redis and ledger, and a worker beside them."""
    import redis

    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    beside = Beside(tmp_path_factory.mktemp("beside"), redis_server, model)
    try:
        beside.start_worker()
        yield beside
    finally:
        beside.stop_all()


@pytest.fixture(scope="module")
def app(beside: Beside) -> Iterator[Celery]:
    with foreign_app(beside.redis_url) as app:
        yield app


@pytest.fixture(scope="module")
def watched(app: Celery) -> Iterator[Watched]:
    with Watched(app) as watched:
        yield watched
