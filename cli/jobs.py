"""`millrace jobs`."""

import time

import click

from cli.counted import counted
from cli.shown_job import as_json_object

_LIMIT = click.IntRange(1, 1_000_000)


@click.command("jobs", short_help="List the newest Jobs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each Job.")
@click.option("--limit", type=_LIMIT, default=20, show_default=True, metavar="N", help="Jobs to list.")
def command(as_json: bool, limit: int) -> None:
    """List the newest Jobs, newest first, and how far they are.

    \b
    Example:
      millrace jobs --limit 5
    """
    import msgspec

    from producer.client import Client
    from producer.identity import given_name

    with Client() as client:
        statuses = [client.status(each) for each in client.jobs(limit)]
    if not statuses and not as_json:
        click.echo("there are no Jobs: `millrace submit FILE` makes one", err=True)
    for status in statuses:
        if as_json:
            click.echo(msgspec.json.encode(as_json_object(status)))
            continue
        num_results = status.num_ok + status.num_error
        results = f"{counted(num_results, 'result')} of {counted(status.num_lines, 'line')}"
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.job.created_at))
        name = given_name(status.job)
        click.echo(f"{status.job.id}  {created}  {status.job.state:<10}  {results}{'  ' if name else ''}{name}")
