"""`millrace cancel`."""

import click

from cli.counted import counted


@click.command("cancel", short_help="Stop Jobs; what has a Result keeps it.")
@click.argument("jobs", metavar="JOB...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each Job.")
def command(jobs: tuple[str, ...], as_json: bool) -> None:
    """Stop Jobs, by their ids or names: what is not computed yet never will be, and what has a Result keeps it.

    A Job that has ended already stays as it is, and the exit code is 0 all the same.

    \b
    Example:
      millrace cancel 3f9a
    """
    import msgspec

    from producer.client import Client

    with Client() as client:
        for job in [client.find(name) for name in jobs]:
            is_cancelled = client.cancel(job)
            status = client.status(job)
            num_results = status.num_ok + status.num_error
            if as_json:
                fields = {"id": job.id, "is_cancelled": is_cancelled, "state": status.job.state}
                click.echo(msgspec.json.encode(fields | {"num_results": num_results}))
            elif is_cancelled:
                click.echo(f"cancelled the Job {job.id}, keeping {counted(num_results, 'result')}")
            else:
                click.echo(f"the Job {job.id} has ended already: it is {status.job.state}")
