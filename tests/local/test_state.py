import subprocess
import sys
from pathlib import Path

import pytest

from protocol.errors import ConfigurationError, StateLocked
from worker.local.child import Child
from worker.local.state import StateFolder

REPOSITORY = Path(__file__).parents[2]

HOLDS = (
    "import sys, pathlib; from worker.local.state import StateFolder\n"
    "with StateFolder(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


def test_folder_is_created_and_can_be_used_again(tmp_path: Path) -> None:
    for _ in range(2):
        with StateFolder(tmp_path / "a" / "state") as state:
            assert state.path.is_dir()
            assert state.database_url == f"sqlite:///{tmp_path}/a/state/ledger.db"


def test_second_run_is_refused_with_the_holders_pid_and_the_way_out(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"

    with pytest.raises(StateLocked) as refused, StateFolder(tmp_path):
        pass

    assert f"process {holder.pid}" in str(refused.value)
    assert "--state DIR" in str(refused.value)
    holder.communicate()
    with StateFolder(tmp_path):
        pass


def test_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.communicate()

    with StateFolder(tmp_path):
        pass


def test_folder_stays_locked_until_a_killed_runs_children_have_ended(tmp_path: Path) -> None:
    # The child takes its time to end, and writes when it has; the next run must not begin before that.
    script = (
        "import sys, os, pathlib, signal; from worker.local.child import Child\n"
        "from worker.local.state import StateFolder\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "with StateFolder(root) as state:\n"
        "    slow = f'trap \"sleep 0.5; echo > {root}/ended; exit\" TERM; echo > {root}/ready; while :; do :; done'\n"
        "    Child(['sh', '-c', slow], log=root / 'log', held_fds=[state.lock_fd])\n"
        "    open(root / 'ready').read()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run(["mkfifo", str(tmp_path / "ready")], check=True)
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=REPOSITORY, check=False)

    with StateFolder(tmp_path):
        assert (tmp_path / "ended").exists()


def test_child_does_not_hand_the_lock_to_its_command(tmp_path: Path) -> None:
    with StateFolder(tmp_path) as state:
        child = Child(["ls", "-l", "/proc/self/fd"], log=tmp_path / "log", held_fds=[state.lock_fd])
        while child.poll() is None:
            pass

    assert "/lock" not in (tmp_path / "log").read_text()


def test_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigurationError, match="choose another with --state DIR"), StateFolder(tmp_path / "file"):
        pass
