"""Servers that refuse or are away, and full disks: one line that says what to do, and the same command goes on."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.cli.conftest import Invoke

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "millrace-tiny"
MILLRACE = (sys.executable, "-P", "-m", "cli.main")
NOBODY = "postgresql+psycopg://user:secret@127.0.0.1:1/millrace"
NEED_DATABASE = (
    ["migrate"],
    ["submit", "prompts.jsonl"],
    ["jobs"],
    ["status", "x"],
    ["results", "x"],
    ["cancel", "x"],
    ["delete", "x"],
    ["verify", "x"],
    ["prune", "--older-than", "1d"],
)


@pytest.fixture
def here(millrace: Invoke, redis_url: str, tmp_path: Path) -> Invoke:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n' * 3)
    return partial(millrace, broker_url=redis_url, model_name="tiny")


class SmallDisk:
    """A file system of one MiB of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        status = os.statvfs(self.path)
        (self.path / "ballast").write_bytes(bytes(status.f_bavail * status.f_bsize))

    def free(self) -> None:
        (self.path / "ballast").unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("a small disk can be mounted by root alone")
    yield SmallDisk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


def wrong_password(url: str) -> str:
    return make_url(url).set(password="wrong-secret").render_as_string(hide_password=False)


def run(*arguments: str, cwd: Path, **settings: str) -> tuple[int, str]:
    """The command in a process of its own; exit code and stderr."""
    return run_command(*MILLRACE, *arguments, cwd=cwd, **settings)


def run_command(*command: str, cwd: Path, **settings: str) -> tuple[int, str]:
    environ = {name: text for name, text in os.environ.items() if not name.startswith("MILLRACE_")}
    environ |= {"PYTHONPATH": str(ROOT), **{f"MILLRACE_{name.upper()}": text for name, text in settings.items()}}
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def assert_one_line(exit_code: int, stderr: str, *parts: str) -> None:
    assert (exit_code, stderr.count("\n")) == (1, 1), stderr
    assert stderr.startswith("Error: ")
    for part in parts:
        assert part in stderr
    assert "secret" not in stderr


@pytest.mark.parametrize("arguments", NEED_DATABASE, ids=lambda arguments: arguments[0])
def test_wrong_password_of_the_database(here: Invoke, postgres_url: str, arguments: list[str]) -> None:
    result = here(*arguments, database_url=wrong_password(postgres_url))

    assert_one_line(
        result.exit_code,
        result.stderr,
        "authentication failed",
        "correct user, password and name in MILLRACE_DATABASE_URL",
    )


@pytest.mark.parametrize("arguments", [["migrate"], ["submit", "prompts.jsonl"], ["jobs"]], ids=lambda a: a[0])
def test_database_that_is_away(here: Invoke, arguments: list[str]) -> None:
    result = here(*arguments, database_url=NOBODY)

    assert_one_line(
        result.exit_code, result.stderr, "Connection refused", "start it, or set MILLRACE_DATABASE_URL to where it runs"
    )


def test_worker_ends_at_once_when_a_server_refuses_it(redis_url: str, postgres_url: str, tmp_path: Path) -> None:
    settings = {"broker_url": redis_url, "database_url": postgres_url, "engine_model": str(MODEL)}

    assert_one_line(
        *run("worker", cwd=tmp_path, **settings | {"broker_url": wrong_password(redis_url)}),
        "refuses the login",
        "set user and password in MILLRACE_BROKER_URL",
    )
    assert_one_line(
        *run("worker", cwd=tmp_path, **settings | {"database_url": wrong_password(postgres_url)}),
        "authentication failed",
        "MILLRACE_DATABASE_URL",
    )


def test_wrong_password_of_redis_loses_nothing_and_the_same_submit_goes_on(
    here: Invoke, database_url: str, redis_url: str
) -> None:
    here = partial(here, database_url=database_url)
    here("migrate")
    refused = here("submit", "prompts.jsonl", broker_url=wrong_password(redis_url))

    assert_one_line(
        refused.exit_code, refused.stderr, "refuses the login", "set user and password in MILLRACE_BROKER_URL"
    )
    (job,) = map(json.loads, here("jobs", "--json").stdout.splitlines())
    assert (job["state"], job["num_lines"]) == ("submitting", 3)
    again = here("submit", "prompts.jsonl")
    assert (again.exit_code, again.stdout, again.stderr) == (0, f"{job['id']}\n", "")
    assert json.loads(here("status", job["id"], "--json").stdout)["state"] == "running"


def test_submit_to_a_full_disk_waits_and_goes_on_once_there_is_room(
    here: Invoke, small_disk: SmallDisk, tmp_path: Path
) -> None:
    here = partial(here, database_url=f"sqlite:///{small_disk.path}/ledger.db")
    # Text that does not compress, more than the disk holds beside the ballast and less than it holds alone.
    lines = [json.dumps({"prompt": os.urandom(500).hex()}) + "\n" for _ in range(600)]
    (tmp_path / "large.jsonl").write_text("".join(lines))
    small_disk.fill()
    full = here("migrate")
    assert_one_line(full.exit_code, full.stderr, "takes no more (database or disk is full): free some space")
    small_disk.free()
    assert here("migrate").exit_code == 0
    (small_disk.path / "ballast").write_bytes(bytes(650 << 10))

    with calling(small_disk.free, at="free some space on its disk"):
        waited = here("submit", "large.jsonl")

    assert waited.exit_code == 0
    said = [line for line in waited.stderr.splitlines() if line.startswith("warning: ")]
    assert re.search(r"the same command goes on; \d+ lines are in, and it goes on when the database does", said[0])
    assert "the database takes lines again: going on after line" in said[1]
    (job,) = map(json.loads, here("jobs", "--json").stdout.splitlines())
    assert (job["id"], job["num_requests"]) == (waited.stdout.strip(), 600)


@contextmanager
def calling(act: Callable[[], None], *, at: str) -> Iterator[None]:
    """Does something once, when the producer warns of this."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if at in record.getMessage():
                logger.removeHandler(self)
                act()

    logger, handler = logging.getLogger("millrace.producer"), Handler()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def test_results_to_a_full_disk_are_kept_for_another_try(
    here: Invoke, database_url: str, small_disk: SmallDisk, tmp_path: Path
) -> None:
    here = partial(here, database_url=database_url)
    here("migrate")
    (tmp_path / "bad.jsonl").write_text("nonsense\n" * 500)
    job_id = here("submit", "bad.jsonl").stdout.strip()
    output = small_disk.path / "out.jsonl"
    output.write_text("what was there before\n")
    small_disk.fill()

    full = here("results", job_id, "-o", output)

    assert_one_line(full.exit_code, full.stderr, "No space left on device: make room there or name another file")
    assert output.read_text() == "what was there before\n"
    assert sorted(path.name for path in small_disk.path.iterdir()) == ["ballast", "out.jsonl"]
    small_disk.free()
    assert here("results", job_id, "-o", output).exit_code == 0
    assert len(output.read_text().splitlines()) == 500


def test_closed_streams_are_done_without_or_named(here: Invoke, redis_url: str, tmp_path: Path) -> None:
    settings = {"broker_url": redis_url, "database_url": f"sqlite:///{tmp_path}/ledger.db", "model_name": "tiny"}
    here("migrate", database_url=settings["database_url"])

    def run_in(closed: str, *arguments: str) -> tuple[int, str]:
        return run_command("sh", "-c", f'exec "$0" "$@" {closed}', *MILLRACE, *arguments, cwd=tmp_path, **settings)

    assert_one_line(*run_in("<&-", "submit", "-", "--job", "x"), "cannot read the input from stdin: it is closed")
    for command in (["results", "x"], ["submit", "prompts.jsonl", "-o", "-"]):
        assert_one_line(*run_in(">&-", *command), "cannot write the results to stdout: it is closed, name a file")
    assert here("jobs", database_url=settings["database_url"]).stdout == ""
    assert run_in("2>&-", "submit", "prompts.jsonl") == (0, "")
    assert run_in("2>&-", "submit", "nothing.jsonl") == (1, "")


def test_run_with_its_state_on_a_full_disk(millrace: Invoke, small_disk: SmallDisk, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    small_disk.fill()

    full = millrace("run", "prompts.jsonl", "-o", "out.jsonl", "--model", MODEL, "--state", small_disk.path / "state")

    assert_one_line(full.exit_code, full.stderr, "No space left on device", "choose another with --state DIR")
