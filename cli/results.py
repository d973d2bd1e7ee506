"""`millrace results`."""

import click

from cli.interrupts import Interrupts
from cli.options import showing_options
from cli.output import STDIN, Output, Showing, check_output


@click.command("results", short_help="Write a Job's Results.")
@click.argument("job")
@click.option("-o", "--output", default="-", metavar="FILE", help="Where to; - is stdout, the default.")
@click.option("--partial", is_flag=True, help="Take what is there now, gaps and all, and do not wait for the rest.")
@showing_options
def command(job: str, output: str, partial: bool, showing: Showing) -> None:
    """Write a Job's Results as they arrive.

    A file appears when the Job has ended, as JSON lines, CSV or Parquet, the first two also in gzip or zstd, by its
    suffixes. stdout gets JSON lines: each Result as soon as nothing before it is missing, or as soon as it is there.

    \b
    Example:
      millrace results 3f9a -o results.jsonl
    """
    from producer.client import Client

    check_output(output, STDIN, showing)
    with Client() as client:
        found = client.find(job)
        with Interrupts(), Output(output, showing, found) as file:
            file.write(client.results(found, order=showing.order, wait=not partial))
