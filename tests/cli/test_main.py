import subprocess
import sys
from pathlib import Path

import pytest

from cli import main
from protocol.errors import ConfigurationError
from tests.cli.conftest import Invoke

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command_with_what_it_does(millrace: Invoke) -> None:
    result = millrace("--help")

    assert result.exit_code == 0
    listed = [line.split(maxsplit=1) for line in result.stdout.partition("Commands:\n")[2].splitlines()]
    assert [name for name, _ in listed] == list(main.COMMANDS)
    assert all(what.endswith(".") for _, what in listed)
    assert ["cancel", "Stop Jobs; what has a Result keeps it."] in listed


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_of_each_command_has_an_example(millrace: Invoke, name: str) -> None:
    result = millrace(name, "--help")

    assert result.exit_code == 0
    assert "  Example:\n" in result.stdout
    assert f"millrace {name}" in result.stdout.partition("Example:")[2]


def test_unknown_command_is_a_usage_error(millrace: Invoke) -> None:
    result = millrace("bogus")

    assert result.exit_code == 2
    assert result.stderr.endswith("Error: No such command 'bogus'.\n")


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in main.COMMANDS)])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    heavy = ("torch", "transformers", "sqlalchemy", "celery", "redis", "alembic")
    code = (
        "import sys; from cli.main import cli\n"
        f"try: cli({arguments!r})\n"
        f"except SystemExit: print('LOADED', *[name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)

    assert done.stdout.splitlines()[-1] == "LOADED"


def test_our_errors_are_one_line_on_stderr_and_exit_code_1(millrace: Invoke) -> None:
    result = millrace("jobs", bogus="1")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: the variable MILLRACE_BOGUS sets bogus, which is not a setting.")
    assert result.stderr.count("\n") == 1


def test_line_breaks_in_a_message_do_not_make_it_more_lines(millrace: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConfigurationError("one\n  two")

    monkeypatch.setattr("protocol.settings.load_settings", fail)

    assert millrace("migrate").stderr == "Error: one two\n"


def test_bugs_keep_their_traceback(millrace: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.settings.load_settings", lambda: 1 / 0)

    assert isinstance(millrace("migrate").exception, ZeroDivisionError)


def test_ctrl_c_is_exit_code_130(millrace: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("protocol.settings.load_settings", interrupt)

    result = millrace("migrate")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")
