"""The command line in this process: settings by environment, a working directory of the test's own."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

Invoke = Callable[..., Result]


@pytest.fixture
def millrace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Call the command line with these arguments; keywords are settings."""
    from cli.main import cli

    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("MILLRACE_"):
            monkeypatch.delenv(name)

    def invoke(*arguments: str | Path, stdin: str | None = None, **settings: str) -> Result:
        environ = {f"MILLRACE_{name.upper()}": value for name, value in settings.items()}
        return CliRunner().invoke(
            cli, [str(argument) for argument in arguments], input=stdin, env=environ, prog_name="millrace"
        )

    return invoke
