"""`millrace results`."""

import click

from cli.output import open_output


@click.command("results", short_help="Write a Job's Results as JSONL.")
@click.argument("job")
@click.option("-o", "--output", default="-", metavar="FILE", help="Where to; - is stdout, the default.")
@click.option("--partial", is_flag=True, help="Take what is there now, gaps and all, and do not wait for the rest.")
def command(job: str, output: str, partial: bool) -> None:
    """Write a Job's Results as JSONL, in the order of its lines, as they arrive.

    A file appears when the Job has ended; stdout gets each Result as soon as nothing before it is missing.

    \b
    Example:
      millrace results 3f9a -o results.jsonl
    """
    from producer.client import Client

    with Client() as client:
        results = client.results(client.find(job), wait=not partial)
        with open_output(output) as file:
            for result in results:
                file.write(result)
