"""A worker with two engines: both get work, and one that is killed costs time and no Result."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Start
from tests.processes import command_line

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def cpu_ticks(pid: int) -> int:
    """Time that the process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_two_engines_share_the_work_and_one_may_die(start: Start, model: Path, tmp_path: Path) -> None:
    num = 240
    lines = [{"prompt": f"the worker pulls {i}", "max_tokens": 60, "temperature": 0} for i in range(num)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    running = start("run", "prompts.jsonl", "-o", "results.jsonl", "--model", model, num_engines="2")
    log = tmp_path / ".millrace"

    def engines() -> list[int]:
        return sorted(pid for pid in running.below() if "worker.engine.process" in command_line(pid))

    def logged(text: str) -> bool:
        return any(text in path.read_text(errors="replace") for path in log.rglob("*.log"))

    running.wait_until(lambda: logged("2 engines: cpu, cpu"))
    both = engines()
    assert len(both) == 2
    started = {pid: cpu_ticks(pid) for pid in both}
    running.wait_until(lambda: all(cpu_ticks(pid) > started[pid] + 10 for pid in both))
    os.kill(both[1], signal.SIGKILL)

    code, _, stderr = running.finish()

    assert code == 0, stderr
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["line"] for r in results] == list(range(1, num + 1))
    assert all(r["error"] is None and r["usage"]["completion_tokens"] == 60 for r in results)
    assert logged("the engine process ended with exit code -9")
    assert running.leaves_no_process()
