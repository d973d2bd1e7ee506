"""`millrace status`."""

import time
from typing import Any

import click


@click.command("status", short_help="Say how far Jobs are.")
@click.argument("job", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, or one for each Job.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="Jobs to list.")
def command(job: str | None, as_json: bool, limit: int) -> None:
    """Say how far a Job is, by its id or name; without one, list the newest Jobs.

    \b
    Example:
      millrace status 3f9a
    """
    import msgspec

    from producer.client import Client

    with Client() as client:
        statuses = [client.status(job)] if job is not None else [client.status(each) for each in client.jobs(limit)]
    if as_json:
        for status in statuses:
            click.echo(msgspec.json.encode(_as_json(status)))
    elif job is not None:
        click.echo("\n".join(f"{name:<20}{value}" for name, value in _as_rows(statuses[0])))
    else:
        for status in statuses:
            num_results = status.num_ok + status.num_error
            results = f"{num_results:,} result{'s' * (num_results != 1)} of {status.num_lines:,} lines"
            created = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.job.created_at))
            click.echo(f"{status.job.id}  {created}  {status.job.state:<10}  {results}  {_shown_name(status)}")


def _as_json(status: Any) -> dict[str, Any]:
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(status)
    job: dict[str, Any] = fields.pop("job")
    return job | fields


def _as_rows(status: Any) -> list[tuple[str, str]]:
    job = status.job
    rows = [
        ("job", job.id),
        ("name", _shown_name(status)),
        ("model", job.model),
        ("state", job.state),
        ("lines", f"{status.num_lines:,}" + (" so far" if job.num_lines is None else "")),
        ("answers", f"{status.num_ok:,}, of them {status.num_cached:,} known already"),
        ("errors", f"{status.num_error:,}"),
        ("requests waiting", f"{status.num_requests_waiting:,}"),
        ("requests running", f"{status.num_requests_leased:,}"),
        ("prompt tokens", f"{status.prompt_tokens:,}"),
        ("output tokens", f"{status.completion_tokens:,}, of them {status.computed_tokens:,} computed"),
    ]
    return [row for row in rows if row[1]]


def _shown_name(status: Any) -> str:
    # A digest says nothing to a reader.
    identity: str = status.job.identity
    return "" if len(identity) == 64 and set(identity) <= set("0123456789abcdef") else identity
