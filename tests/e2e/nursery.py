"""Workers with the null engine as forks of one process that has imported all they need, which takes seconds: so each
starts in a moment.

    python -m tests.e2e.nursery

A line of JSON on stdin asks for one thing and is answered by one on stdout: `{"start": {environ}, "log": path}` by a
pid, `{"wait": pid, "for_s": seconds}` by the exit status as `subprocess` has it, or null. At end-of-file all that are
left are killed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class Forked:
    """A worker below a Nursery."""

    def __init__(self, nursery: "Nursery", pid: int) -> None:
        self._nursery, self.pid = nursery, pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, for_s: float) -> int | None:
        status: int | None = self._nursery.ask({"wait": self.pid, "for_s": for_s})
        return status


class Nursery:
    """As the tests see it; `folder` is the workers' and holds their logs."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self._folder = folder
        self._num_started = 0
        with (folder / "nursery.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.nursery"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=environ,
                text=True,
            )

    def start(self, environ: dict[str, str]) -> Forked:
        log = self._folder / f"worker-{self._num_started}.log"
        self._num_started += 1
        return Forked(self, self.ask({"start": environ, "log": str(log)}))

    def ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, (self._folder / "nursery.log").read_text()
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate()


def _run_worker(environ: dict[str, str], log: str) -> None:
    """In the fork; does not return."""
    from protocol import faults
    from protocol.settings import load_settings
    from worker.main import run_worker

    code = 1
    try:
        nothing = os.open(os.devnull, os.O_RDONLY)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for source, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(environ)
        faults._fault = faults._armed(os.environ)
        code = run_worker(load_settings(), engine_module="benchmarks.null_engine")
    finally:
        os._exit(code)


def _wait(pid: int, for_s: float) -> int | None:
    deadline = time.monotonic() + for_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def main() -> None:
    from transformers import AutoTokenizer  # noqa: F401

    import worker.main  # noqa: F401

    pids = []
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = _wait(question["wait"], question["for_s"])
        else:
            answer = os.fork()
            if not answer:
                _run_worker(question["start"], question["log"])
            pids.append(answer)
        print(json.dumps(answer), flush=True)
    for pid in pids:
        with suppress(ProcessLookupError, ChildProcessError):  # waited for already
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
