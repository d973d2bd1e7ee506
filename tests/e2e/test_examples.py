"""The examples as their first lines say to run them, beside a worker."""

import csv
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import PATIENCE_S, ROOT, Start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def environ(start: Start, model: Path, redis_url: str, tmp_path: Path) -> dict[str, str]:
    """Variables of a system with a worker."""
    settings = {
        "broker_url": redis_url,
        "database_url": f"sqlite:///{tmp_path / 'ledger.db'}",
        "engine_model": str(model),
    }
    assert start("migrate", **settings).finish()[0] == 0
    start("worker", **settings)
    given = {f"MILLRACE_{name.upper()}": value for name, value in settings.items()}
    return {**os.environ, "PYTHONPATH": str(ROOT), **given}


def test_examples_run_beside_a_worker(environ: dict[str, str], tmp_path: Path) -> None:
    texts = ["the queue holds the prompts", "and the worker pulls them", ""]
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["key", "text"], *([f"k{i}", text] for i, text in enumerate(texts))])

    command = [sys.executable, str(ROOT / "examples/score_csv.py"), "reviews.csv", "-o", "scored.csv"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=PATIENCE_S)

    assert done.returncode == 0, done.stderr
    with (tmp_path / "scored.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["key"], row["text"]) for row in rows] == [(f"k{i}", text) for i, text in enumerate(texts)]
    assert [row["error"] for row in rows] == ["", "", "empty_continuation"]
    assert all(float(row["perplexity"]) > 1 for row in rows[:2])

    backend = [sys.executable, str(ROOT / "examples/web_backend.py"), "0"]
    with subprocess.Popen(backend, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found is not None
            _try_backend(found[0])
        finally:
            server.terminate()


def _try_backend(address: str) -> None:
    status, answer = call(f"{address}/ask", "the queue")
    assert (status, answer[0]["error"], answer[0]["usage"]["prompt_tokens"] > 0) == (200, None, True)
    status, (job,) = call(f"{address}/jobs", ["the worker", "the prompts"])
    assert (status, job["lines"]) == (202, 2)
    status, results = call(f"{address}/jobs/{job['job']}/results")
    assert (status, {result["line"] for result in results}) == (200, {1, 2})
    assert call(f"{address}/jobs/{job['job']}") == (200, [{"state": "finished", "lines": 2, "ok": 2, "errors": 0}])
    assert call(f"{address}/jobs/unknown")[0] == 404
    status, (refused,) = call(f"{address}/ask", {"prompt": 5})
    assert (status, "prompt" in refused["error"]) == (400, True)


def call(address: str, content: Any = None) -> tuple[int, list[Any]]:
    """Status and the JSON lines that come back."""
    body = None if content is None else json.dumps(content).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body), timeout=PATIENCE_S) as reply:
            return reply.status, [json.loads(line) for line in reply.read().splitlines()]
    except urllib.error.HTTPError as error:
        return error.code, [json.loads(line) for line in error.read().splitlines()]
