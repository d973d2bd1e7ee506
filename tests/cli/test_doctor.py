import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from click.testing import Result
from safetensors.torch import save_file

from cli import machine_checks
from storage.ledger import Ledger
from tests.cli.conftest import Invoke

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "models" / "millrace-tiny")
CLOSED = "redis://:secret-word@127.0.0.1:1/0"


def found(result: Result) -> dict[str, dict[str, Any]]:
    """What was printed as JSON, by name; of several with one name the last."""
    return {line["name"]: line for line in map(json.loads, result.stdout.splitlines())}


@pytest.fixture
def limited_redis(redis_url: str) -> Iterator[Callable[[str, str], str]]:
    """Sets maxmemory and its policy for the length of a test."""
    with redis.Redis.from_url(redis_url) as client:

        def limit(maxmemory: str, policy: str) -> str:
            client.config_set("maxmemory", maxmemory)
            client.config_set("maxmemory-policy", policy)
            return redis_url

        yield limit
        limit("0", "noeviction")


def test_all_is_well_on_a_machine_that_has_everything(
    millrace: Invoke, redis_url: str, ledger: Ledger, database_url: str
) -> None:
    result = millrace("doctor", "--json", broker_url=redis_url, database_url=database_url, engine_model=MODEL)

    assert result.exit_code == 0, result.output
    lines = found(result)
    assert {name for name, line in lines.items() if line["state"] != "ok"} <= {"workers", "disk"}
    assert lines["redis"]["facts"].startswith(tuple("678"))
    assert lines["database"]["facts"].endswith("tables up to date, writable")
    assert lines["queues"]["facts"] == ("millrace.millrace-tiny.normal 0, millrace.millrace-tiny.bulk 0, unacked 0")
    assert lines["jobs"]["facts"] == "none; 0 Chunks wait for a worker"
    assert (lines["workers"]["state"], lines["workers"]["facts"]) == ("warning", "none answers")
    assert "-0.0 s" not in result.output
    assert ("clock" in lines) == database_url.startswith("postgresql")
    assert lines["attention"]["facts"] in ("sparse in float32", "triton in bfloat16")
    assert "served as millrace-tiny" in lines["model"]["facts"]
    for url in (redis_url, database_url):
        if "@" in url:
            assert url.partition("@")[0].rpartition(":")[2] not in result.output


def test_every_line_is_there_when_everything_is_missing(millrace: Invoke) -> None:
    result = millrace("doctor", broker_url=CLOSED, engine_model="/nowhere", engine_device="cuda:4000")

    assert result.exit_code == 1
    assert "secret-word" not in result.output
    states = {line.split()[1]: line.split()[0] for line in result.stdout.splitlines() if line[0] != " "}
    failed = {name for name, state in states.items() if state == "failed"}
    assert failed == {"redis", "database", "workers", "device", "model"}
    assert "create it with `millrace migrate`" in result.stdout
    assert "-> start it, or set MILLRACE_BROKER_URL" in result.stdout
    assert result.stderr.startswith("5 failed, ")


def test_the_lines_on_attention_and_model_are_about_the_model_that_is_given(millrace: Invoke, tmp_path: Path) -> None:
    encoder, broken = tmp_path / "encoder", tmp_path / "broken"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    save_file({"embeddings.weight": torch.zeros(2, 2)}, encoder / "model.safetensors")
    shutil.copytree(MODEL, broken)

    def said(model: str | Path, quantization: str = "none") -> tuple[str, str, str]:
        settings = {"engine_device": "cpu", "engine_quantization": quantization}
        lines = found(millrace("doctor", model, "--json", broker_url=CLOSED, **settings))
        return lines["attention"]["facts"], lines["model"]["state"], lines["model"]["facts"]

    attention, state, facts = said(encoder)
    assert (attention, state) == ("sdpa in float32, to embed", "failed")
    assert facts.startswith(f"{encoder} has no tokenizer that can be loaded")
    attention, state, facts = said(broken)
    assert (attention, state) == ("sparse in float32", "ok")
    assert facts.endswith(" on cpu in float32")
    assert said(broken, "float8")[2].endswith(" on cpu in float32, before they are quantized to float8")
    unknown = "sparse in float32, as far as can be said without the model"
    for name in ("nobody/no-such-model", "no-such-folder"):
        assert said(name)[:2] == (unknown, "warning")
    attention, state, facts = said("/nowhere")
    assert (attention, state) == (unknown, "failed")
    assert facts.startswith("engine.model='/nowhere': there is no such folder")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert said(broken)[2].startswith(f"{weights} is not a complete safetensors file")
    (broken / "config.json").write_text("{")
    assert said(broken)[2].endswith("config.json is no JSON object: copy or download the model again")


def test_wrong_password_of_redis_is_named_as_such(millrace: Invoke, redis_url: str) -> None:
    wrong = "redis://:wrong-word@" + redis_url.partition("@")[2]

    line = found(millrace("doctor", "--json", broker_url=wrong))["redis"]

    assert (line["state"], line["way_out"]) == ("failed", "set user and password in MILLRACE_BROKER_URL")
    assert "refuses the login" in line["facts"]
    assert "wrong-word" not in str(line)


def test_redis_that_would_throw_queues_away_is_a_warning(
    millrace: Invoke, limited_redis: Callable[[str, str], str]
) -> None:
    url = limited_redis("100mb", "allkeys-lru")

    line = found(millrace("doctor", "--json", broker_url=url))["redis memory"]

    assert line["state"] == "warning"
    assert line["facts"].endswith("of 100.0 MiB, policy allkeys-lru")
    assert "noeviction" in line["way_out"]


def test_settings_that_cannot_be_read_are_a_failed_line(millrace: Invoke) -> None:
    result = millrace("doctor", lease_seconds="-1")

    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("failed")]
    assert line.endswith("lease_seconds=-1.0 is out of range: it must be from 0.1 to 86,400")


def test_client_without_torch_is_told_that_it_can_submit(
    millrace: Invoke, redis_url: str, open_ledger: Callable[[str], Ledger], tmp_path: Path, monkeypatch: Any
) -> None:
    open_ledger(f"sqlite:///{tmp_path}/ledger.db").migrate()

    def version(name: str) -> str:
        if name in ("torch", "transformers"):
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    installed = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(machine_checks, "find_spec", lambda name: None)

    result = millrace("doctor", "--json", broker_url=redis_url, database_url=f"sqlite:///{tmp_path}/ledger.db")

    assert result.exit_code == 0, result.output
    lines = found(result)
    assert lines["worker packages"]["facts"] == f"{machine_checks.CLIENT_ONLY} (torch, transformers)"
    assert {lines[name]["facts"] for name in ("device", "model")} == {machine_checks.CLIENT_ONLY}
    assert "pip install torch" in lines["device"]["way_out"]


def test_a_package_that_is_too_old_fails(millrace: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version
    version = {"celery": "5.4.0"}
    monkeypatch.setattr(metadata, "version", lambda name: version.get(name) or installed(name))

    line = found(millrace("doctor", "--json", broker_url=CLOSED))["packages"]

    assert (line["state"], line["facts"]) == ("failed", "celery is 5.4.0, not >=5.7")


def test_disk_without_space_fails(millrace: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})())

    line = found(millrace("doctor", "--json", broker_url=CLOSED))["disk"]

    assert (line["state"], line["facts"].partition(" free")[0]) == ("failed", "temporary files: 1.0 MiB")


def test_asking_for_the_own_worker_loads_nothing_heavy_and_fails_without_one(redis_url: str, tmp_path: Path) -> None:
    code = (
        "import sys; from cli.main import cli\n"
        "try: cli(['doctor', '--worker'])\n"
        "except SystemExit as ended: print(ended.code, [n for n in ('torch', 'sqlalchemy') if n in sys.modules])"
    )
    environ = {"MILLRACE_BROKER_URL": redis_url, "MILLRACE_MODEL_NAME": "tiny", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environ)

    assert done.stdout.splitlines()[-1] == "1 []", done.stderr
    assert "none named tiny@" in done.stdout
