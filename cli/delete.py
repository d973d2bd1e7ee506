"""`millrace delete`."""

import click

from cli.counted import counted


@click.command("delete", short_help="Delete Jobs with their Results.")
@click.argument("jobs", metavar="JOB...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Cancel a Job that has not ended, instead of refusing it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each Job.")
def command(jobs: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Delete Jobs, by their ids or names, with all their Requests and Results. It cannot be undone.

    Stopped half-way, the same command goes on. The answers that a Job brought stay known to later Jobs until
    `millrace prune --answers-older-than` deletes them.

    \b
    Example:
      millrace delete 3f9a
    """
    import msgspec

    from cli.live_line import LiveLine
    from producer.client import Client

    with Client() as client, LiveLine() as line:
        # All are found before any goes; one that is named twice goes once.
        for job in {job.id: job for job in map(client.find_to_delete, jobs)}.values():
            num_results = client.delete(
                job, force=force, on_progress=lambda number: line.show(lambda: f"{number:,} results deleted")
            )
            line.clear()
            if as_json:
                click.echo(msgspec.json.encode({"id": job.id, "num_results": num_results}))
            else:
                click.echo(f"deleted the Job {job.id} with {counted(num_results, 'result')}")
