"""Locust's users against a system of their own, a few of them for a moment."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.load import percentile
from tests.compose import ROOT


def test_load_counts_every_answer_and_writes_a_report(tmp_path: Path) -> None:
    html = tmp_path / "load.html"
    command = [sys.executable, "-m", "benchmarks.load", "--users", "5", "--time", "3s", "--html", str(html)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"] == 0
    assert found["requests"] >= 5
    assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"]
    assert "<html" in html.read_text()


def test_percentile_is_the_least_time_that_so_many_stayed_within() -> None:
    times = {10: 90, 500: 9, 2000: 1}

    assert [percentile(times, part) for part in (0.5, 0.9, 0.95, 0.99, 1.0)] == [10, 10, 500, 500, 2000]
    assert percentile({}, 0.5) is None
