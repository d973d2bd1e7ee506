"""`millrace status`."""

from typing import TYPE_CHECKING

import click

from cli.shown_job import as_json_object

if TYPE_CHECKING:
    from storage.jobs import JobStatus


@click.command("status", short_help="Say how far a Job is.")
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(job: str, as_json: bool) -> None:
    """Say how far a Job is, by its id or name. `millrace jobs` lists them.

    \b
    Example:
      millrace status 3f9a
    """
    import msgspec

    from producer.client import Client

    with Client() as client:
        status = client.status(job)
    if as_json:
        click.echo(msgspec.json.encode(as_json_object(status)))
    else:
        click.echo("\n".join(f"{name:<20}{value}" for name, value in _as_rows(status)))


def _as_rows(status: "JobStatus") -> list[tuple[str, str]]:
    from producer.identity import given_name

    job = status.job
    rows = [
        ("job", job.id),
        ("name", given_name(job)),
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
