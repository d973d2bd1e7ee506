"""The console script as real processes, with a model that is made in a moment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes import Watched, descendants
from tests.tiny_model import build_tiny_model

ROOT = Path(__file__).resolve().parents[2]
#: Seconds for anything to happen; starting a worker takes about ten on two busy cores.
PATIENCE_S = 120.0


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder named `tiny`: a random Llama of two layers that holds 512 tokens, with a tokenizer and a template."""
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


class Running:
    """A `millrace` process, with every process that was ever seen below it."""

    def __init__(self, arguments: list[str], folder: Path, environ: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cli.main", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environ,
            # As a terminal starts it, also when these tests run in the background of a shell, which ignores SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.seen: set[int] = set()

    def below(self) -> set[int]:
        now = descendants(self.process.pid)
        self.seen |= now
        return now

    def wait_until(self, is_so: Callable[[], object]) -> None:
        """Poll while the process runs."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"it did not happen: {self.process.communicate()}")
            self.below()
            time.sleep(0.02)

    def finish(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        stdout, stderr = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, stdout, stderr

    def leaves_no_process(self) -> bool:
        with Watched(self.seen) as seen:
            left = seen.left_after(PATIENCE_S)
        assert left == []
        return True


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the console script in `tmp_path`, configured by these settings alone."""
    started: list[Running] = []
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    # Slow on purpose, so that there is a middle of the Job to be killed in.
    engine = {"MILLRACE_ENGINE_NUM_THREADS": "1", "MILLRACE_ENGINE_MAX_NUM_SEQS": "16", "MILLRACE_CHUNK_REQUESTS": "16"}

    def start_one(*arguments: str | Path, **settings: str) -> Running:
        given = {f"MILLRACE_{name.upper()}": value for name, value in settings.items()}
        environ = {**plain, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **engine, **given}
        started.append(Running([str(argument) for argument in arguments], tmp_path, environ))
        return started[-1]

    yield start_one
    for running in started:
        if running.process.poll() is None:
            running.below()
            running.process.kill()
        running.process.communicate()
        with Watched(running.seen) as left:
            left.kill()
