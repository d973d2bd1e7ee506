"""`millrace dead-letters`."""

import time
from typing import Any

import click

from cli.counted import counted

_LINE = click.IntRange(1, 2**63 - 1)
_lines = click.argument("lines", metavar="[LINE]...", type=_LINE, nargs=-1)


@click.group("dead-letters", short_help="Look after requests that were given up.")
def command() -> None:
    """Requests that an engine died of again and again, or that the worker failed at: given up, so that the rest of
    their Job could go on. Each is named by its Job and line.

    \b
    Example:
      millrace dead-letters list
    """


@command.command("list")
@click.argument("job", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each.")
def list_command(job: str | None, as_json: bool) -> None:
    """List them, the newest first: of one Job, or all.

    \b
    Example:
      millrace dead-letters list 3f9a
    """
    import msgspec

    from producer.client import Client

    with Client() as client:
        letters = client.dead_letters(job)
    if not letters and not as_json:
        click.echo("there are no dead letters" + ("" if job is None else f" of the Job {job}"), err=True)
    for letter in letters:
        if as_json:
            click.echo(msgspec.json.encode(letter))
        else:
            created = time.strftime("%Y-%m-%d %H:%M", time.localtime(letter.created_at))
            where = f"{letter.job_id}  line {letter.line}, sample {letter.sample}"
            click.echo(f"{where}  {created}  {letter.code}: {letter.reason}")


@command.command("show")
@click.argument("job")
@click.argument("line", type=_LINE)
def show_command(job: str, line: int) -> None:
    """Show one with its request, as a JSON object: the prompt is in it.

    \b
    Example:
      millrace dead-letters show 3f9a 17
    """
    import msgspec

    from producer.client import Client

    with Client() as client:
        letters, request = client.dead_letter(job, line)
    shown: dict[str, Any] = {"samples": msgspec.to_builtins(letters), "request": msgspec.to_builtins(request)}
    click.echo(msgspec.json.format(msgspec.json.encode(shown), indent=2))


@command.command("replay")
@click.argument("job")
@_lines
def replay_command(job: str, lines: tuple[int, ...]) -> None:
    """Compute them again: these lines', or all of the Job's. Their errors are taken back until then.

    Those in Chunks that are being worked on right now stay: replay again a little later.

    \b
    Example:
      millrace dead-letters replay 3f9a
    """
    from producer.client import Client

    with Client() as client:
        num = client.replay(job, lines or None)
    click.echo(f"{counted(num, 'result')} taken back to be computed again")


@command.command("drop")
@click.argument("job")
@_lines
def drop_command(job: str, lines: tuple[int, ...]) -> None:
    """Forget them: these lines', or all of the Job's. Their error results stay.

    \b
    Example:
      millrace dead-letters drop 3f9a
    """
    from producer.client import Client

    with Client() as client:
        num = client.drop_dead_letters(job, lines or None)
    click.echo(f"{counted(num, 'dead letter')} dropped")
