"""Servers of a benchmark's own, as their makers ship them: PostgreSQL flushes every commit to the disk."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

#: Seconds a server may take to start.
_START_S = 30.0


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URL of an empty database in a new cluster. Raises FileNotFoundError where PostgreSQL is not installed."""
    binaries = postgres_binaries()
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    folder.mkdir(parents=True)
    password, port = secrets.token_hex(8), free_port()
    (folder / "password").write_text(password)
    if user is not None:
        for path in (folder, folder / "password"):
            shutil.chown(path, user, user)
    initdb: list[str | Path] = [binaries / "initdb", "-D", folder / "data", "-U", "postgres", "-E", "UTF8"]
    initdb += ["--no-locale", "-A", "scram-sha-256", "--pwfile", folder / "password"]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, user=user, group=user, cwd=folder)
    command: list[str | Path] = [binaries / "postgres", "-D", folder / "data", "-k", folder]
    command += ["-c", "listen_addresses=127.0.0.1", "-c", f"port={port}"]
    with (folder.parent / "postgres.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, user=user, group=user, cwd=folder)
    try:
        url = f"postgresql+psycopg://postgres:{password}@127.0.0.1:{port}/postgres"
        _wait_until_it_answers(url.replace("+psycopg", ""), server)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def postgres_binaries() -> Path:
    found = shutil.which("initdb")
    if found and shutil.which("postgres"):
        return Path(found).parent
    # Debian keeps them off PATH, one folder for each version.
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not versions:
        raise FileNotFoundError("PostgreSQL is not installed: no initdb on PATH or in /usr/lib/postgresql")
    return versions[-1].parent


def _wait_until_it_answers(url: str, server: "subprocess.Popen[bytes]") -> None:
    import psycopg

    deadline = time.monotonic() + _START_S
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
