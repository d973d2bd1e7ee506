"""Every command in compose.yaml and the Dockerfile's health check, as processes with compose's own arguments.

What differs from containers: all share one network, so that each server has a port of its own.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.compose import ROOT, read_compose
from tests.conftest import PostgresCluster, free_port
from tests.e2e.conftest import PATIENCE_S
from tests.processes import command_line

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="ends processes by their group"),
    pytest.mark.skipif(
        not all(map(shutil.which, ("redis-server", "redis-cli", "pg_isready"))), reason="a server's tools are missing"
    ),
]

PASSWORDS = {"REDIS_PASSWORD": "redis1word", "POSTGRES_PASSWORD": "postgres1word", "FLOWER_PASSWORD": "flower1word"}
SCRIPTS = sysconfig.get_path("scripts")


class Composition:
    """The services of compose.yaml as processes."""

    def __init__(self, folder: Path, ports: Mapping[str, int], model: Path) -> None:
        self._folder = folder
        self.ports = ports
        variables = {**PASSWORDS, "MILLRACE_ENGINE_MODEL": str(model)}
        self.services = read_compose(variables)["services"]
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, name: str, *more: str, arguments: list[str] | None = None) -> subprocess.Popen[str]:
        """`arguments` stand for the service's command, as `docker compose run` has it; `more` follow it."""
        service = self.services[name]
        entrypoint = service.get("entrypoint") or self._entrypoint(service)
        command = [*entrypoint, *(arguments or service["command"]), *more]
        with (self._folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [self._local(part) for part in command],
                cwd=self._folder,
                env=self._environ(service),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def run(self, name: str, *arguments: str) -> tuple[int, str]:
        """Exit code and stdout."""
        process = self.start(name, arguments=list(arguments) or None)
        stdout, _ = process.communicate(timeout=PATIENCE_S)
        return process.returncode, stdout

    def is_healthy(self, name: str) -> bool:
        service = self.services[name]
        if "healthcheck" in service:
            kind, *command = service["healthcheck"]["test"]
            command = ["sh", "-c", *command] if kind == "CMD-SHELL" else command
        else:
            (check,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
            command = json.loads(check)
        environ = self._environ(service) | {"PGPORT": str(self.ports["postgres"])}
        local = [self._local(part).replace("redis-cli", f"redis-cli -p {self.ports['redis']}") for part in command]
        return subprocess.run(local, env=environ, cwd=self._folder, capture_output=True).returncode == 0

    def wait_until_healthy(self, name: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_healthy(name):
            dead = [process for process in self._processes if process.poll() not in (None, 0)]
            if dead or time.monotonic() > deadline:
                pytest.fail(f"{name} is not healthy: {(self._folder / f'{name}.log').read_text()}")
            time.sleep(0.05)

    def stop_all(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
            process.communicate()

    def _entrypoint(self, service: Any) -> list[str]:
        return ["millrace"] if "build" in service else []

    def _environ(self, service: Any) -> dict[str, str]:
        given = {name: self._local(value) for name, value in service.get("environment", {}).items()}
        plain = {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(self._folder)}
        return {**plain, "OMP_NUM_THREADS": "1", **given}

    def _local(self, text: str) -> str:
        for there, here in {
            "redis:6379": f"127.0.0.1:{self.ports['redis']}",
            "postgres:5432": f"127.0.0.1:{self.ports['postgres']}",
            "127.0.0.1:5555": f"127.0.0.1:{self.ports['flower']}",
            "--port=5555": f"--port={self.ports['flower']}",
            "--address=0.0.0.0": "--address=127.0.0.1",
        }.items():
            text = text.replace(there, here)
        return text


@pytest.fixture
def composition(tmp_path: Path, model: Path, postgres_cluster: PostgresCluster) -> Iterator[Composition]:
    # What the PostgreSQL image makes of POSTGRES_USER, POSTGRES_PASSWORD and POSTGRES_DB.
    postgres_cluster.execute(f"CREATE ROLE millrace LOGIN PASSWORD '{PASSWORDS['POSTGRES_PASSWORD']}'")
    postgres_cluster.execute("CREATE DATABASE millrace OWNER millrace")
    ports = {"redis": free_port(), "postgres": postgres_cluster.port, "flower": free_port()}
    composition = Composition(tmp_path, ports, model)
    yield composition
    composition.stop_all()
    postgres_cluster.drop("millrace")
    postgres_cluster.execute("DROP ROLE millrace")


def status_of(url: str, login: str | None = None) -> int:
    headers = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_services_of_the_compose_file_answer_prompts_together(composition: Composition, tmp_path: Path) -> None:
    redis = composition.start("redis", "--port", port(composition, "redis"), "--bind", "127.0.0.1", "--dir", ".")
    for server in ("redis", "postgres"):
        composition.wait_until_healthy(server)
    assert PASSWORDS["REDIS_PASSWORD"] not in command_line(redis.pid)
    code, stdout = composition.run("migrate")
    assert (code, "up to date" in stdout) == (0, True)

    assert not composition.is_healthy("worker-cpu")
    worker = composition.start("worker-cpu")
    flower = composition.start("flower")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the queue"}\n{"prompt": "the worker"}\n')
    code, stdout = composition.run(
        "client", "submit", "prompts.jsonl", "--wait", "-o", "-", "--max-tokens", "4", "--temperature", "0"
    )
    assert code == 0
    assert [json.loads(line)["usage"]["completion_tokens"] for line in stdout.splitlines()] == [4, 4]

    composition.wait_until_healthy("worker-cpu")
    composition.wait_until_healthy("flower")
    page = f"http://127.0.0.1:{port(composition, 'flower')}/"
    assert status_of(page) == 401
    assert status_of(page, f"millrace:{PASSWORDS['FLOWER_PASSWORD']}") == 200
    code, stdout = composition.run("client")
    assert code == 0, stdout
    assert "1 worker answers: tiny@" in stdout

    worker.terminate()
    assert worker.wait(PATIENCE_S) == 0
    assert not composition.is_healthy("worker-cpu")
    flower.terminate()
    flower.wait(PATIENCE_S)
    redis.terminate()
    assert redis.wait(PATIENCE_S) == 0
    assert not composition.is_healthy("redis")


def port(composition: Composition, name: str) -> str:
    return str(composition.ports[name])
