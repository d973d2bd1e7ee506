import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from worker.local import guard
from worker.local.child import Child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pidfd and PDEATHSIG are Linux's")

#: Says its pid and stays.
STAYS = ["sh", "-c", "echo $$; exec sleep 1000"]
REPOSITORY = Path(__file__).parents[2]


class Guarded:
    """A guard with a command; both write to one pipe, whose end-of-file says that both are gone."""

    def __init__(self, *command: str, program: tuple[str, ...] = ("-I", "-S", guard.__file__)) -> None:
        watched, self.lifeline = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, *program, "--fd", str(watched), "--", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[watched],
            cwd=REPOSITORY,
        )
        os.close(watched)

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def read_until_both_are_gone(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.read().decode()

    def cut_lifeline(self) -> None:
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1


Start = Callable[..., Guarded]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Guarded] = []

    def start_one(*command: str, **options: tuple[str, ...]) -> Guarded:
        started.append(Guarded(*command, **options))
        return started[-1]

    yield start_one
    for one in started:
        one.cut_lifeline()
        one.process.kill()
        one.process.communicate()


def test_guard_passes_output_and_exit_code_on(start: Start) -> None:
    guarded = start("sh", "-c", "echo hello; exit 7")

    assert guarded.read_until_both_are_gone() == "hello\n"
    assert guarded.process.wait() == 7


def test_guard_says_by_128_which_signal_killed_the_command(start: Start) -> None:
    guarded = start("sh", "-c", "kill -9 $$")

    assert guarded.process.wait() == 128 + signal.SIGKILL


def test_guard_exits_127_when_there_is_no_such_command(start: Start) -> None:
    guarded = start("/nonexistent/command")

    assert guarded.process.wait() == 127
    assert guarded.read_until_both_are_gone().startswith("cannot start /nonexistent/command")


def test_command_ends_when_the_parents_pipe_closes(start: Start) -> None:
    guarded = start(*STAYS)
    guarded.read_line()

    guarded.cut_lifeline()

    assert guarded.read_until_both_are_gone() == ""
    assert guarded.process.wait() == 128 + signal.SIGTERM


def test_command_that_ignores_sigterm_is_killed_after_the_grace(start: Start) -> None:
    hurried = (
        "import sys; from worker.local import guard; guard.ORPHAN_GRACE_S = 0.1; sys.exit(guard.main(sys.argv[1:]))"
    )
    guarded = start("sh", "-c", "trap '' TERM; echo ready; while :; do read x; done", program=("-c", hurried))
    assert guarded.read_line() == "ready"

    guarded.cut_lifeline()

    guarded.read_until_both_are_gone()
    assert guarded.process.wait() == 128 + signal.SIGKILL


def test_command_ends_when_the_guard_is_killed(start: Start) -> None:
    guarded = start(*STAYS)
    guarded.read_line()

    guarded.process.kill()

    assert guarded.read_until_both_are_gone() == ""


def test_guard_hands_sigterm_on_and_lets_the_command_end_in_order(start: Start) -> None:
    guarded = start("sh", "-c", "trap 'echo bye; exit 3' TERM; echo ready; while :; do :; done")
    assert guarded.read_line() == "ready"

    guarded.process.send_signal(signal.SIGTERM)

    assert guarded.read_line() == "bye"
    assert guarded.process.wait() == 3


def test_command_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "pid"
    os.mkfifo(fifo)
    script = (
        "import sys, pathlib, signal; from worker.local.child import Child\n"
        "child = Child(['sh', '-c', 'echo $$ > ' + sys.argv[1] + '; exec sleep 1000'], log=pathlib.Path(sys.argv[2]))\n"
        "signal.pause()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(fifo), str(tmp_path / "log")], cwd=REPOSITORY)
    command = os.pidfd_open(int(fifo.read_text()))
    try:
        parent.kill()
        parent.wait()

        assert select.select([command], [], [], 10)[0], "the command is still there"
    finally:
        os.close(command)


def test_child_ends_in_order_when_it_is_stopped(tmp_path: Path) -> None:
    fifo = tmp_path / "ready"
    os.mkfifo(fifo)
    child = Child(
        ["sh", "-c", f"trap 'echo bye; exit 3' TERM; echo > {fifo}; while :; do :; done"], log=tmp_path / "log"
    )
    fifo.read_text()
    assert child.poll() is None

    child.stop(grace_s=10)

    assert child.poll() == 3
    assert child.log_tail(5) == ["bye"]


def test_child_that_ignores_the_stop_is_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "ready"
    os.mkfifo(fifo)
    child = Child(["sh", "-c", f"trap '' TERM; echo > {fifo}; while :; do :; done"], log=tmp_path / "log")
    fifo.read_text()

    child.stop(grace_s=0.1)

    assert child.poll() == 128 + signal.SIGKILL


def wait_for_end(child: Child) -> None:
    guard_process = os.pidfd_open(child.pid)
    select.select([guard_process], [], [])
    os.close(guard_process)
    assert child.poll() is not None


def test_childs_log_tail_leaves_out_what_an_earlier_one_printed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    wait_for_end(Child(["echo", "first"], log=log))

    child = Child(["sh", "-c", "cat; echo second"], log=log, stdin=b"given\n")
    wait_for_end(child)

    assert child.log_tail(5) == ["given", "second"]
    assert log.read_text() == "first\ngiven\nsecond\n"
