"""`millrace flower` beside a broker: what its pages and its API show of Chunks, calls and workers, and to whom."""

import base64
import json
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner

from cli.main import cli
from producer.client import Client
from protocol.sampling import SamplingParams
from protocol.settings import Settings
from tests.conftest import free_port
from tests.e2e.conftest import PATIENCE_S
from tests.e2e.foreign import MARKER, TWIN, Beside, app, beside, generate, wait_until
from tests.processes import command_line

__all__ = ["app", "beside"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PASSWORD = "flower1word"
Fetch = Callable[..., Any]


class Flower:
    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.process = process
        self._url = f"http://127.0.0.1:{port}"

    def status(self, path: str, password: str | None = PASSWORD) -> int:
        try:
            with self._open(path, password) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def text(self, path: str) -> str:
        with self._open(path, PASSWORD) as reply:
            text: str = reply.read().decode()
            return text

    def api(self, path: str) -> Any:
        return json.loads(self.text(f"/api/{path}"))

    def tasks(self) -> dict[str, Any]:
        tasks: dict[str, Any] = self.api("tasks?limit=1000")
        return tasks

    def _open(self, path: str, password: str | None) -> Any:
        login = base64.b64encode(f"millrace:{password}".encode()).decode()
        headers = {"Authorization": f"Basic {login}"} if password is not None else {}
        return urllib.request.urlopen(urllib.request.Request(self._url + path, headers=headers), timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def flower(beside: Beside) -> Flower:
    """It has seen the worker."""
    port = free_port()
    process = beside.start("flower", "--port", str(port), log="flower", flower_password=PASSWORD)
    flower = Flower(process, port)
    wait_until(lambda: flower.status("/healthcheck", None) == 200, "Flower's start")
    wait_until(lambda: flower.api("workers?refresh=1"), "seeing the worker")
    return flower


def test_chunks_are_shown_with_their_counts_and_true_runtimes(flower: Flower, beside: Beside) -> None:
    settings = Settings(broker_url=beside.redis_url, database_url=beside.database_url, model_name="tiny")
    lines = [{"prompt": f"{MARKER} {i}"} for i in range(64)] + [{"prompt": f"{MARKER} " * 400} for _ in range(2)]
    with Client(settings) as client:
        params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
        job = client.submit(lines[:62] + lines[64:], params=params)
        assert client.wait(job).num_error == 2

    def ended() -> list[dict[str, Any]]:
        return [t for t in flower.tasks().values() if t["name"] == "millrace.chunk" and t["state"] == "SUCCESS"]

    (chunk,) = wait_until(ended)
    assert chunk["result"] == "62 ok, 2 error"
    # 62 Sequences of 100 tokens in rows of 16; what Celery's own clock would see takes a few milliseconds.
    assert chunk["runtime"] > 0.1
    assert chunk["runtime"] == pytest.approx(chunk["succeeded"] - chunk["started"], abs=0.5)


def test_calls_are_shown_with_counts_and_failures_as_failures(flower: Flower, app: Celery) -> None:
    good = generate(app, "good").delay()
    text = good.get(timeout=PATIENCE_S)["text"]
    bad = generate(app, "bad", top_p=2).delay()
    with pytest.raises(ValueError, match="top_p"):
        bad.get(timeout=PATIENCE_S)
    tasks = wait_until(lambda: (seen := flower.tasks()).keys() >= {good.id, bad.id} and seen)
    wait_until(lambda: flower.tasks()[bad.id]["state"] == "FAILURE")
    assert re.fullmatch("1 answer, [0-9]+ tokens in, 8 out", flower.tasks()[good.id]["result"])
    assert tasks[good.id]["args"] == "(<16 characters>,)"
    failure = flower.tasks()[bad.id]
    assert (
        failure["exception"]
        == "ValueError('invalid_parameter: top_p=2.0 is out of range: it must be above 0 and at most 1')"
    )
    # Not even whoever has the password gets an answer through Flower.
    assert flower.status(f"/api/task/result/{good.id}") == 503
    columns = urllib.parse.urlencode(
        {"draw": 1, "start": 0, "length": 100, "order[0][column]": 0, "columns[0][data]": "name"}
    )
    pages = [f"/task/{good.id}", f"/task/{bad.id}", "/tasks", f"/tasks/datatable?{columns}", "/", "/broker"]
    worker = next(iter(flower.api("workers?refresh=1")))
    seen = "".join(flower.text(page) for page in [*pages, f"/worker/{worker}"]) + json.dumps(flower.tasks())
    assert good.id in seen
    assert MARKER not in seen
    assert text not in seen


def test_a_worker_is_shown_with_its_model_device_backend_and_limits(flower: Flower, beside: Beside) -> None:
    ((name, worker),) = flower.api("workers?refresh=1").items()
    facts = worker["stats"]["pool"]
    assert name.startswith("tiny@")
    assert (facts["model"], facts["device"], facts["attention"], facts["layout"]) == ("tiny", "cpu", "sparse", "packed")
    assert (facts["max_model_len"], facts["max_num_seqs"]) == (512, 16)
    assert facts["kv_tokens"] > 0
    page = flower.text(f"/worker/{name}")
    assert "sparse" in page.lower()
    queues = {queue["name"] for queue in worker["active_queues"]}
    own = {f"millrace.{name}.{kind}" for name in ("tiny", TWIN) for kind in ("bulk", "normal", "interactive")}
    assert queues == {*own, "celery"}


def test_only_those_with_the_password_see_anything(flower: Flower, beside: Beside) -> None:
    for path in ("/", "/tasks", "/api/tasks", "/api/workers"):
        assert (flower.status(path, None), flower.status(path, "wrong"), flower.status(path)) == (401, 401, 200)
    secret = urllib.parse.urlsplit(beside.redis_url).password
    assert secret is not None
    shown = command_line(flower.process.pid) + flower.text("/broker") + beside.log("flower").read_text()
    assert "flower" in shown
    assert secret not in shown
    assert PASSWORD not in shown


def test_without_a_password_it_is_on_the_loopback_alone_and_changes_nothing(beside: Beside) -> None:
    refused = CliRunner().invoke(cli, ["flower", "--address", "0.0.0.0"])
    assert (refused.exit_code, "set MILLRACE_FLOWER_PASSWORD" in refused.output) == (1, True)
    stranger = {"MILLRACE_BROKER_URL": beside.redis_url.replace("redis://:", "redis://:not-")}
    shut_out = CliRunner().invoke(cli, ["flower"], env=stranger)
    assert (shut_out.exit_code, "refuses the login" in shut_out.output) == (1, True)
    port = free_port()
    flower = Flower(beside.start("flower", "--port", str(port), log="open"), port)
    wait_until(lambda: flower.status("/healthcheck", None) == 200)
    assert (flower.status("/tasks", None), flower.status("/api/tasks", None)) == (200, 401)
    taken = beside.start("flower", "--port", str(port), log="taken")
    assert taken.wait(PATIENCE_S) == 1
    assert "cannot listen on 127.0.0.1" in beside.log("taken").read_text()
    flower.process.terminate()
    assert flower.process.wait(PATIENCE_S) == 0
