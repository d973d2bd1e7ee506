"""System: Redis, a ledger and two workers with the bundled model, each a Service, for what is to be killed in it."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.queue_servers import free_port, postgres_binaries
from benchmarks.service import Service
from protocol.errors import DatabaseUnavailable
from protocol.settings import EngineSettings, Settings
from storage.ledger import Ledger
from worker.local.redis_server import find_redis_server
from worker.local.system import settings_environ

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "millrace-tiny"
WORKERS = ("worker 0", "worker 1")
#: Seconds for a server to answer.
_START_S = 60.0


class System:
    """Its `services` are "redis", "postgres" where that is the `database`, and WORKERS."""

    def __init__(self, database: str, folder: Path, lease_s: float) -> None:
        self.folder = folder
        self.services: dict[str, Service] = {}
        password, port = secrets.token_hex(8), free_port()
        redis = [find_redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password]
        self.services["redis"] = Service([*redis, "--save", "", "--dir", folder], folder / "redis.log", {**os.environ})
        url = f"sqlite:///{folder}/ledger.db"
        if database == "postgresql":
            url = self._add_postgres()
        engine = EngineSettings(model=str(MODEL), max_num_seqs=32, num_threads=1)
        broker_url = f"redis://:{password}@127.0.0.1:{port}/0"
        self.settings = Settings(broker_url=broker_url, database_url=url, engine=engine, lease_seconds=lease_s)

    @contextlib.contextmanager
    def running(self) -> Iterator[Ledger]:
        """Everything is started, and started again whenever it has ended; at the end all of it is killed."""
        self._tend()
        ledger = Ledger(self.settings.database_url)
        _until(ledger.migrate)
        for name in WORKERS:
            command: list[str | Path] = [sys.executable, "-m", "cli.main", "worker"]
            self.services[name] = Service(command, self.log(name), self._environ())
        stop = threading.Event()
        tending = threading.Thread(target=self._tend_until, args=(stop,))
        tending.start()
        try:
            yield ledger
        finally:
            stop.set()
            tending.join()
            for service in self.services.values():
                service.kill(restart_s=1e9)
            ledger.close()

    def log(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.log"

    def _tend(self) -> None:
        for service in list(self.services.values()):
            service.tend()

    def _tend_until(self, stop: threading.Event) -> None:
        while not stop.wait(0.02):
            self._tend()

    def _environ(self) -> dict[str, str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        return {**plain, **settings_environ(self.settings), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def _add_postgres(self) -> str:
        binaries, data = postgres_binaries(), self.folder / "postgres"
        user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
        data.mkdir()
        if user is not None:
            for path in (self.folder, data):
                shutil.chown(path, user, user)
        initdb: list[str | Path] = [binaries / "initdb", "-D", data / "data", "-U", "postgres", "-E", "UTF8"]
        initdb += ["--no-locale", "-A", "trust"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, user=user, group=user, cwd=data)
        port = free_port()
        command: list[str | Path] = [binaries / "postgres", "-D", data / "data", "-k", data, "-p", str(port)]
        self.services["postgres"] = Service(command, data / "log", {**os.environ}, user)
        return f"postgresql+psycopg://postgres@/postgres?host={data}&port={port}"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """One that PostgreSQL's own user can go through, and that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="millrace-system-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _until(act: Callable[[], object]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            act()
            return
        except DatabaseUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
