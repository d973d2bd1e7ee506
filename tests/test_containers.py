"""compose.yaml and the Dockerfile as they stand; what their commands do is tested in e2e/test_compose.py."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose import ROOT, MissingVariable, read_compose

PASSWORDS = {"REDIS_PASSWORD": "redis1word", "POSTGRES_PASSWORD": "postgres1word", "FLOWER_PASSWORD": "flower1word"}


def instructions() -> Iterator[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            yield name, rest


def tool(name: str) -> str:
    """Where it is: beside this interpreter, whether its environment is activated or not, or on the PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_compose_file_is_valid_by_the_compose_specification() -> None:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(ROOT / "compose.yaml")]

    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", PASSWORDS)
def test_compose_refuses_to_start_without_a_password(name: str) -> None:
    with pytest.raises(MissingVariable, match=f"{name}: set it in .env"):
        read_compose({**PASSWORDS, name: ""})


def test_example_of_the_environment_names_every_variable() -> None:
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", (ROOT / "compose.yaml").read_text()))
    named = re.findall(r"^#?(\w+)=", (ROOT / "deploy" / "env.example").read_text(), re.MULTILINE)

    assert sorted(named) == sorted(used)


def test_services_listen_on_the_loopback_alone_and_say_how_they_are() -> None:
    services = read_compose(PASSWORDS)["services"]

    assert set(services) == {"redis", "postgres", "migrate", "worker-gpu", "worker-cpu", "flower", "client"}
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "network_mode" not in service
        shown = str(service.get("command")) + str(service.get("entrypoint"))
        assert not any(password in shown for password in PASSWORDS.values()), f"{name} shows a password to `ps`"
        is_once = name in ("migrate", "client")
        has_health = "healthcheck" in service or service.get("build", {}).get("target") == "worker"
        assert is_once or (has_health and service["restart"] == "unless-stopped"), name
        for needed, how in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if needed == "migrate" else "service_healthy"
            assert how == {"condition": expected}
    assert [name for name in services if services[name].get("profiles") == ["gpu"]] == ["worker-gpu"]
    assert [name for name in services if services[name].get("profiles") == ["cpu"]] == ["worker-cpu"]


def test_dockerfile_passes_its_linter() -> None:
    done = subprocess.run([tool("hadolint"), "-t", "warning", str(ROOT / "Dockerfile")], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout


def test_dockerfile_copies_what_is_there_and_what_setuptools_packs() -> None:
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    sources = [
        source
        for name, rest in instructions()
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]

    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in kept
    assert {pattern.rstrip("*") for pattern in packed} <= set(sources)


def test_dockerfile_has_the_targets_that_compose_builds_and_runs_them_as_nobody_special() -> None:
    stages: dict[str, dict[str, str]] = {}
    for name, rest in instructions():
        if name == "FROM":
            stages[rest.split()[-1]] = {"FROM": rest}
        elif stages:
            stages[list(stages)[-1]][name] = rest
    services = read_compose(PASSWORDS)["services"]
    targets = {service["build"]["target"] for service in services.values() if "build" in service}

    assert targets == {"client", "worker"}
    for target in targets:
        assert stages[target]["USER"] == "10001"
        assert stages[target]["ENTRYPOINT"] == '["millrace"]'
    assert "torch" not in stages["client-build"]["RUN"]


def test_commands_of_the_dockerfile_can_be_parsed_by_a_shell() -> None:
    runs = [rest for name, rest in instructions() if name == "RUN"]

    assert len(runs) >= 4
    for run in runs:
        subprocess.run(["sh", "-n"], input=run, text=True, check=True)
        assert shlex.split(run)


def test_paths_in_the_compose_file_exist_in_the_image() -> None:
    assert Path(ROOT, read_compose(PASSWORDS)["x-environment"]["MILLRACE_ENGINE_MODEL"]).is_dir()


def test_worker_image_has_the_compiler_that_triton_needs() -> None:
    stages = "\n".join(f"{name} {rest}" for name, rest in instructions()).split("\nFROM ")

    (worker,) = [stage for stage in stages if stage.startswith("base AS worker")]
    assert re.search(r"apt-get install .*\bgcc libc6-dev\b", worker)
