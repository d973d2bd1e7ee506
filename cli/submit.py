"""`millrace submit`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import job_option, sampling_options
from protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from producer.source import Input


@click.command("submit", short_help="Put a file of prompts into the queue.")
@click.argument("input_path", metavar="FILE", type=click.Path(allow_dash=True))
@click.option("--wait", is_flag=True, help="Stay until the Job has ended.")
@click.option("-o", "--output", metavar="FILE", help="Write the Results there at the end; includes --wait.")
@job_option
@sampling_options
def command(input_path: str, wait: bool, output: str | None, name: str | None, params: SamplingParams) -> None:
    """Put a JSONL file's prompts into the queue as one Job, and print the Job's id. - is stdin.

    The same file again goes on with the same Job, so an interrupted submit is simply repeated.

    \b
    Example:
      millrace submit prompts.jsonl --max-tokens 100 --wait -o results.jsonl
    """
    from cli.progress import Progress
    from cli.summary import Summary
    from producer.client import Client
    from producer.results_file import ResultsFile

    source: Input = sys.stdin.buffer if input_path == "-" else Path(input_path)
    with Client() as client, Progress() as progress:
        job = client.submit(source, name=name, params=params)
        click.echo(job.id)
        if not wait and output is None:
            return
        summary = Summary()
        if output is None:
            client.wait(job, on_progress=progress.show)
            return
        with ResultsFile(Path(output)) as file:
            status = client.wait(job, on_progress=progress.show)
            for result in client.results(job, wait=False):
                file.write(result)
                summary.add(result)
    click.echo(summary.text(status, output), err=True)
