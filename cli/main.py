"""The console script: a group whose commands are imported when they are asked for, and how errors reach the user."""

import importlib
from typing import Any

import click

from cli.standard_streams import stand_in_for_closed_streams
from protocol.errors import MillraceError

#: Each is a module of this package with a `command`; in the order of the help page.
COMMANDS = (
    *("run", "migrate", "worker"),
    *("submit", "jobs", "status", "results", "verify", "cancel", "delete", "prune"),
    *("dead-letters", "doctor", "tune", "flower"),
)
#: What a shell reports for a program that Ctrl-C ended.
INTERRUPTED = 130


class CommandGroup(click.Group):
    """Turns our errors into one line on stderr and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"cli.{cmd_name.replace('-', '_')}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MillraceError as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="millrace")
def cli() -> None:
    """Run language models over many prompts, from one file on this machine to queues and many workers.

    Everything is configured by MILLRACE_* variables or a millrace.toml; `millrace run` needs neither.
    """


def main() -> None:
    """The console script."""
    stand_in_for_closed_streams()
    cli(prog_name="millrace")


if __name__ == "__main__":
    main()
