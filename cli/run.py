"""`millrace run`: the whole system on one machine, from a file of prompts to a file of Results."""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.interrupts import Interrupts
from cli.options import job_option, not_empty, reading_options, retry_option, sampling_options, showing_options
from cli.output import STDIN, Output, Showing, check_output, shown_output
from cli.standard_streams import stdin
from protocol.sampling import SamplingParams
from protocol.settings import Settings, load_settings

if TYPE_CHECKING:
    from producer.client import Client
    from producer.source import Reading, Source
    from storage.jobs import Job, JobStatus
    from worker.local.state import StateFolder

#: Seconds between two looks at the processes while lines are taken in.
_SUPERVISE_INTERVAL_S = 1.0
#: Hex digits of a model's digest that make its private name: enough to tell a machine's models apart.
_DIGEST_DIGITS = 12


_OUTPUT_HELP = (
    "The file for the Results, as JSON lines, CSV or Parquet, the first two also in gzip or zstd, by its suffixes; - "
    "is stdout, as JSON lines."
)


@click.command("run", short_help="Answer a file of prompts on this machine.")
@click.argument("input_path", metavar="INPUT", type=click.Path(allow_dash=True))
@click.option("-o", "--output", required=True, metavar="OUTPUT", help=_OUTPUT_HELP)
@click.option("--model", metavar="MODEL", help="A folder with a model, or a name on the model hub.")
@click.option("--model-name", metavar="NAME", help="The name that lines of the input ask for.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")
@click.option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; auto suits the device.")
@click.option(
    "--state",
    metavar="DIR",
    default=".millrace",
    show_default=True,
    callback=not_empty,
    help="Where ledger and logs are kept.",
)
@retry_option
@job_option
@reading_options
@showing_options
@sampling_options
def command(
    input_path: str,
    output: str,
    model: str | None,
    model_name: str | None,
    device: str | None,
    dtype: str | None,
    state: str,
    retry_errors: bool,
    name: str | None,
    reading: "Reading",
    showing: Showing,
    params: SamplingParams,
) -> None:
    """Answer the prompts of INPUT with everything that takes on this machine.

    INPUT is JSON lines, CSV or Parquet, the first two also in gzip or zstd, by its suffixes; - is stdin.

    Starts a private Redis and a worker, and stops them at the end. The same command again goes on where it was
    stopped, and computes nothing that is known. MILLRACE_BROKER_URL and MILLRACE_DATABASE_URL are not used here.
    The exit code is 1 when no line at all was answered.

    \b
    Example:
      millrace run prompts.jsonl -o results.jsonl --max-tokens 100 --temperature 0
    """
    from cli.worker_packages import check_worker_packages
    from producer.source import Source
    from worker.local.state import StateFolder

    overrides = {"engine.model": model, "model_name": model_name, "engine.device": device, "engine.dtype": dtype}
    settings = load_settings(overrides)
    model_names = (settings.served_model, settings.engine.model)
    source = Source(stdin() if input_path == STDIN else Path(input_path), reading)
    # What cannot work is refused before anything is made or started.
    check_worker_packages()
    if name is None:
        source.check()
    check_output(output, input_path, showing)
    if name is None:
        source.digest()
    private = _name_by_content(settings)
    with Interrupts() as interrupts, StateFolder(Path(state)) as folder:
        private = _in_folder(private, folder)
        writing = _Writing(output, showing, settings.served_model)
        run = _Run(private, folder, source, name, params, model_names, interrupts, retry_errors, writing)
        started = time.monotonic()
        job, is_computed = run.ensure_results()
        # What stands under a name now may be another input than the one that was answered.
        is_readable = input_path != STDIN and (is_computed or name is None)
        prompts = _first_prompts(Source(Path(input_path), reading), model_names) if is_readable else {}
        run.write(job, prompts, None if not is_computed else time.monotonic() - started)


class _Run:
    def __init__(
        self,
        settings: Settings,
        folder: "StateFolder",
        source: "Source",
        name: str | None,
        params: SamplingParams,
        model_names: tuple[str, ...],
        interrupts: Interrupts,
        retry_errors: bool,
        writing: "_Writing",
    ) -> None:
        self._writing = writing
        self._settings = settings
        self._folder = folder
        self._source = source
        self._name = name
        self._params = params
        self._model_names = model_names
        self._interrupts = interrupts
        self._retry_errors = retry_errors

    def ensure_results(self) -> "tuple[Job, bool]":
        """Bring the Job to its end; False when it was there already, in which case nothing is started."""
        from producer.client import Client
        from producer.job_watch import ENDED

        with Client(self._settings) as client:
            job = client.find_same(self._source, name=self._name, params=self._params)
            if job is None:
                self._source.check()
            elif job.state in ENDED:
                is_wanted = self._retry_errors and job.state == "finished"
                if not (is_wanted and client.has_retriable_errors(job)):
                    return job, False
        try:
            return self._compute(), True
        except KeyboardInterrupt:
            self._say_how_to_go_on()
            raise

    def write(self, job: "Job", prompts: dict[int, str], seconds: float | None) -> None:
        """Write all Results to the output, if they are not there yet, and on stdout (stderr when the Results are there)
        what became of them."""
        from cli.summary import check_any_answer
        from producer.client import Client

        writing, summary, output = self._writing, self._writing.summary, self._writing.output
        with Client(self._settings) as client:
            status = client.status(job)
            if not writing.is_done:
                with writing.open(job) as file:
                    file.write(client.results(job, wait=False), summary.add)
        if seconds is None and self._name is not None:
            how = (
                f"nothing was computed: the Job {self._name!r} ({job.id}) is complete, so the input was not read again"
            )
        elif seconds is None:
            how = f"nothing was computed: all of it was known, as Job {job.id}"
        else:
            how = f"{seconds:,.1f} s, as Job {job.id}; the same command again computes nothing"
        parts = [summary.text(status, shown_output(output, writing.showing)), how]
        is_on_stderr = writing.showing.takes_stdout(output)
        if not is_on_stderr and (answers := summary.first_answers(prompts)):
            parts += ["", answers]
        click.echo("\n".join(parts), err=is_on_stderr)
        check_any_answer(status, f"they are in {shown_output(writing.showing.errors or output)}")

    def _compute(self) -> "Job":
        from cli.progress import Progress
        from producer.client import Client
        from worker.local.system import LocalSystem

        with Progress() as progress:
            progress.say(f"starting Redis and a worker with {self._settings.engine.model}; logs in {self._folder.path}")
            with (
                LocalSystem(self._folder, self._settings, _worker_command(), _worker_environ()) as system,
                Client(system.settings) as client,
            ):

                def look(status: "JobStatus") -> None:
                    self._interrupts.check()
                    system.supervise(status.num_ok + status.num_error)
                    progress.show_status(status, is_loading=not system.is_worker_ready)

                try:
                    job = self._submit(client, look)
                    with self._writing.meanwhile(client, job):
                        client.wait(job, on_progress=look)
                except KeyboardInterrupt:
                    progress.say("stopping in order; once more stops at once")
                    raise
                return job

    def _submit(self, client: "Client", look: "Callable[[JobStatus], None]") -> "Job":
        known = client.find_same(self._source, name=self._name, params=self._params)
        if known is not None:
            # The Redis that knew of these Chunks is gone, and without messages other Jobs' older Chunks came first.
            client.announce(known)
        last_look = time.monotonic()

        def look_now_and_then(_last_line: int) -> None:
            nonlocal last_look
            if time.monotonic() - last_look >= _SUPERVISE_INTERVAL_S:
                found = client.find_same(self._source, name=self._name, params=self._params)
                assert found is not None
                look(client.status(found))
                last_look = time.monotonic()

        return client.submit(
            self._source,
            name=self._name,
            params=self._params,
            model_names=self._model_names,
            retry_errors=self._retry_errors,
            on_progress=look_now_and_then,
        )

    def _say_how_to_go_on(self) -> None:
        from producer.client import Client

        with Client(self._settings) as client:
            job = client.find_same(self._source, name=self._name, params=self._params)
            status = client.status(job) if job is not None else None
        num_results = status.num_ok + status.num_error if status is not None else 0
        click.echo(f"stopped; {num_results:,} results are kept, and the same command goes on from there", err=True)


class _Writing:
    """What is to be written where, `model` being the name the model has for everybody; and what became of it."""

    def __init__(self, output: str, showing: Showing, model: str) -> None:
        from cli.summary import Summary

        self.output = output
        self.showing = showing
        self.summary = Summary()
        self.is_done = False
        self._model = model

    def open(self, job: "Job") -> Output:
        return Output(self.output, self.showing, job, self._model)

    @contextmanager
    def meanwhile(self, client: "Client", job: "Job") -> Iterator[None]:
        """Results are written as they finish, if they are wanted so, and all of them are when the context is left."""
        from cli.collector import Collector

        if self.showing.order == "input":
            yield
            return
        with self.open(job) as file, Collector(client, job, file, self.summary.add):
            yield
        self.is_done = True


def _name_by_content(settings: Settings) -> Settings:
    """The settings with a model name that says which files and options answer.

    Jobs of a model that has changed since wait in the same ledger; they are not for the worker of this one.
    """
    import msgspec

    from worker.engine.model_files import ENGINE_VERSION, files_digest, resolve_folder

    engine = settings.engine
    files = files_digest(resolve_folder(engine.model, engine.revision))
    decisive = [files, ENGINE_VERSION, engine.dtype, engine.device, engine.attention, engine.max_model_len]
    decisive += [engine.task, engine.pooling, engine.normalize, engine.kv_dtype, engine.quantization]
    digest = hashlib.sha256(msgspec.json.encode(decisive)).hexdigest()[:_DIGEST_DIGITS]
    return msgspec.structs.replace(settings, model_name=f"{settings.served_model}-{digest}", also_serves=())


def _in_folder(settings: Settings, folder: "StateFolder") -> Settings:
    """The settings for the folder's ledger, which is brought up to date."""
    import msgspec

    from storage.ledger import Ledger

    ledger = Ledger(folder.database_url)
    try:
        ledger.migrate()
    finally:
        ledger.close()
    # The private Redis gets its address when it is started.
    return msgspec.structs.replace(settings, broker_url="redis://127.0.0.1", database_url=folder.database_url)


def _worker_command() -> list[str]:
    # Not the working directory's packages of the same names, whatever they are.
    return [sys.executable, "-P", "-m", "cli.main", "worker"]


def _worker_environ() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _first_prompts(source: "Source", model_names: tuple[str, ...]) -> dict[int, str]:
    """What the first lines ask, to be shown beside their answers."""
    from itertools import islice

    from producer.lines import LineReader
    from protocol.requests import Request

    with source.lines() as lines:
        items = list(islice(LineReader(lines, model_names), 20))
    requests = [item for item in items if isinstance(item, Request)]
    return {r.line: r.messages[-1].content if r.messages else r.prompt or "" for r in requests}
