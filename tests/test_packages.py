"""The generic package names resolve to this repository, and a client stays free of everything heavy."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("protocol", "storage", "batching", "producer", "worker", "cli")


@pytest.mark.parametrize("package", PACKAGES)
def test_package_resolves_to_this_repository(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin == str(ROOT / package / "__init__.py")


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("producer", ("torch", "sqlalchemy", "celery", "redis")),
        ("producer.async_client", ("torch", "transformers", "numpy", "worker", "batching")),
        ("producer.client", ("torch", "transformers", "numpy", "worker", "batching")),
        ("batching.scheduler", ("torch", "redis", "sqlalchemy", "celery")),
        ("worker.engine.process", ("redis", "sqlalchemy", "celery", "kombu")),
        ("cli.main", ("torch", "transformers", "sqlalchemy", "celery")),
    ],
)
def test_importing_a_module_stays_clear_of(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data[package]
