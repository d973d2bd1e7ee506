"""`millrace submit`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import job_option, priority_option, reading_options, retry_option, sampling_options, showing_options
from cli.output import STDIN, Output, Showing, check_output, shown_output
from cli.standard_streams import stdin
from protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from producer.source import Reading
    from protocol.priority import Priority


@click.command("submit", short_help="Put a file of prompts into the queue.")
@click.argument("input_path", metavar="FILE", type=click.Path(allow_dash=True))
@click.option("--wait", is_flag=True, help="Stay until the Job has ended.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Write the Results there at the end, as its suffixes say; - is stdout, as JSON lines. Includes --wait.",
)
@priority_option
@retry_option
@job_option
@reading_options
@showing_options
@sampling_options
def command(
    input_path: str,
    wait: bool,
    output: str | None,
    priority: "Priority | None",
    retry_errors: bool,
    name: str | None,
    reading: "Reading",
    showing: Showing,
    params: SamplingParams,
) -> None:
    """Put a file's prompts into the queue as one Job, and print the Job's id.

    FILE is JSON lines, CSV or Parquet, the first two also in gzip or zstd, by its suffixes; - is stdin.

    The same file again goes on with the same Job, so an interrupted submit is simply repeated. Whoever waits gets exit
    code 1 when no line at all was answered.

    \b
    Example:
      millrace submit prompts.jsonl --max-tokens 100 --wait -o results.jsonl
    """
    from cli.collector import Collector
    from cli.interrupts import Interrupts
    from cli.progress import Progress
    from cli.summary import Summary, check_any_answer
    from producer.client import Client
    from producer.source import Source

    if showing != Showing() and output is None:
        raise click.UsageError("--errors, --format and --order go with -o, which says where the Results are written")
    source = Source(stdin() if input_path == STDIN else Path(input_path), reading)
    if name is None:
        source.check()
    if output is not None:
        check_output(output, input_path, showing)
    with Client() as client, Progress() as progress:
        known = client.find_same(source, name=name, params=params)
        if name is not None and known is not None and known.state != "submitting":
            progress.say(f"the Job {name!r} has all its lines: the input is not read again")
        job = client.submit(
            source,
            name=name,
            params=params,
            priority=priority,
            retry_errors=retry_errors,
            on_progress=lambda number: progress.show(lambda: f"{number:,} lines are in"),
        )
        progress.clear()
        click.echo(job.id, err=showing.takes_stdout(output))
        if not wait and output is None:
            return
        if output is None:
            check_any_answer(client.wait(job, on_progress=progress.show_status), "`millrace results` shows them")
            return
        summary = Summary()
        with Interrupts(), Output(output, showing, job) as file:
            if showing.order == "finished":
                with Collector(client, job, file, summary.add):
                    status = client.wait(job, on_progress=progress.show_status)
            else:
                status = client.wait(job, on_progress=progress.show_status)
                file.write(client.results(job, wait=False), summary.add)
    click.echo(summary.text(status, shown_output(output, showing)), err=True)
    check_any_answer(status, f"they are in {shown_output(showing.errors or output)}")
