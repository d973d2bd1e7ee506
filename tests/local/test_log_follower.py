from pathlib import Path

from worker.local.log_follower import LogFollower

AT = "2030-01-02 03:04:05,678"


def write(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_readiness_and_the_last_complaint_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    follower = LogFollower(path)
    follower.read()
    assert (follower.is_ready, follower.trouble) == (False, None)

    write(path, f"{AT} WARNING millrace.worker: first\nsome print\n{AT} INFO millrace.worker: engine rea")
    follower.read()
    assert (follower.is_ready, follower.trouble) == (False, "first")

    write(path, f"dy: pid 1, cpu\n{AT} ERROR millrace.worker: second\n  File traceback\n{AT} INFO x: third\n")
    follower.read()
    assert (follower.is_ready, follower.trouble) == (True, "second")


def test_what_an_earlier_process_wrote_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    write(path, f"{AT} INFO millrace.worker: engine ready: pid 1\n{AT} ERROR millrace.worker: old\n")

    follower = LogFollower(path)
    follower.read()
    assert (follower.is_ready, follower.trouble) == (False, None)

    write(path, f"{AT} INFO millrace.worker: engine ready: pid 2\n{AT} ERROR millrace.worker: new\n")
    follower.read()
    follower.restart()
    follower.read()
    assert (follower.is_ready, follower.trouble) == (False, None)


def test_long_complaint_is_shortened(tmp_path: Path) -> None:
    follower = LogFollower(tmp_path / "worker.log")
    write(tmp_path / "worker.log", f"{AT} ERROR x: {'y' * 1000}\n")
    follower.read()

    assert follower.trouble == "y" * 300 + "..."
