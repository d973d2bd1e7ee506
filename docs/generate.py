"""Writes docs/settings.md and docs/cli.md from the code, so that what they say is said once: `make docs`."""

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
from click.testing import CliRunner

from cli.main import COMMANDS, cli
from protocol import settings

FOLDER = Path(__file__).resolve().parent
_WARNING = "<!-- Written by `make docs`; change the code instead. -->"
#: The settings whose values no list in the code limits, with what does.
_ELSEWHERE = {
    "engine.device": "auto, cpu, cuda, cuda:N",
    "broker_url": "redis, rediss, redis+socket",
    "database_url": "sqlite, postgresql+psycopg",
}


def pages() -> dict[str, str]:
    """File names in docs/ and what must stand in them."""
    return {"settings.md": _settings_page(), "cli.md": _cli_page()}


def _settings_page() -> str:
    lines = [
        "# Settings",
        "",
        _WARNING,
        "",
        "Every setting is a variable of the environment or a name in `millrace.toml`, which is read from the working",
        f"directory or from where `{settings.CONFIG_VARIABLE}` points. A variable wins over the file, and a command's",
        "option over both. A name that is not a setting is an error, and so is a value out of its limits.",
        "",
        "```toml",
        'database_url = "postgresql+psycopg://user:password@host/name"',
        "",
        "[engine]",
        'model = "Qwen/Qwen3-0.6B"',
        "```",
    ]
    for title, struct, prefix in (
        ("The system", settings.Settings, ""),
        ("The engine: the table [engine]", settings.EngineSettings, "engine."),
    ):
        lines += ["", f"## {title}", "", "| setting, variable | type | default | limits | |", "|---|---|---|---|---|"]
        lines += _rows(struct, prefix)
    return "\n".join(lines) + "\n"


def _rows(struct: type[msgspec.Struct], prefix: str) -> Iterator[str]:
    texts, types = _descriptions(struct), get_type_hints(struct)
    for field in msgspec.structs.fields(struct):
        if field.name == "engine":
            continue
        dotted = prefix + field.name
        variable = settings.ENV_PREFIX + dotted.replace(".", "_").upper()
        default = "" if field.default in (None, ()) else f"`{_shown(field.default)}`"
        cells = [f"`{dotted}`<br>`{variable}`", _type(types[field.name]), default, _limits(dotted, types[field.name])]
        yield "| " + " | ".join([*cells, texts[field.name]]) + " |"


def _descriptions(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The strings under a struct's fields, which Python itself does not keep. Raises KeyError for one without."""
    (body,) = ast.parse(inspect.getsource(struct)).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                texts[name] = " ".join(words.split())
    missing = [name for name in struct.__struct_fields__ if name not in texts]
    if missing:
        raise KeyError(f"a setting has no description below it in {struct.__name__}: {', '.join(missing)}")
    return texts


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return "list of texts"
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return next((names[part] for part in (hint, *get_args(hint)) if part in names), "text")


def _limits(dotted: str, hint: Any) -> str:
    if dotted in settings.LIMITS:
        least, most = settings.LIMITS[dotted]
        return f"{least:,} to {most:,}"
    literal = [choice for choice in get_args(hint) if isinstance(choice, str)]
    return _ELSEWHERE.get(dotted) or ", ".join(settings.CHOICES.get(dotted) or literal)


def _cli_page() -> str:
    lines = [
        "# The command line",
        "",
        _WARNING,
        "",
        "Exit codes: 0 done, 1 an error (one line on stderr, with the way out), 2 a command that cannot be understood,",
        "130 stopped by Ctrl-C, SIGTERM or SIGHUP.",
    ]
    for arguments in _commands():
        title = " ".join(["millrace", *arguments])
        lines += ["", f"## {title}", "", "```", f"$ {title} --help", _help(*arguments).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _commands() -> Iterator[tuple[str, ...]]:
    """Each with what is under it."""
    yield ()
    for name in COMMANDS:
        yield (name,)
        command = importlib.import_module(f"cli.{name.replace('-', '_')}").command
        yield from ((name, below) for below in getattr(command, "commands", ()))


def _help(*arguments: str) -> str:
    result = CliRunner().invoke(cli, [*arguments, "--help"], prog_name="millrace", terminal_width=100)
    assert result.exit_code == 0, result.output
    return "\n".join(line.rstrip() for line in result.output.splitlines())


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name, file=sys.stderr)
