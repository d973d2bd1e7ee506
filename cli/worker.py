"""`millrace worker`."""

import sys

import click


@click.command("worker", short_help="Work on what is in the queue.")
@click.option("--model", metavar="MODEL", help="A folder with a model, or a name on the model hub.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")
@click.option(
    "--also-serve",
    multiple=True,
    metavar="NAME",
    help="Take what is for this name too, and answer it with the same model; can be given several times.",
)
@click.option("--drain-seconds", type=float, metavar="SECONDS", help="How long to go on when stopped.")
def command(model: str | None, device: str | None, also_serve: tuple[str, ...], drain_seconds: float | None) -> None:
    """Take Chunks from the queue, run the model over them, and store the Results.

    SIGTERM, SIGHUP or Ctrl-C stops it in order: nothing more is taken, what ends within --drain-seconds is finished,
    the rest goes back into the queue with the Results it has. Once more, or SIGQUIT, gives everything back at once.

    \b
    Example:
      MILLRACE_BROKER_URL=redis://:password@host:6379/0 \\
      MILLRACE_DATABASE_URL=postgresql+psycopg://user:password@host/name \\
        millrace worker --model models/millrace-tiny
    """
    from cli.worker_packages import check_worker_packages
    from protocol.settings import load_settings

    settings = load_settings(
        {
            "engine.model": model,
            "engine.device": device,
            "also_serves": also_serve or None,
            "drain_seconds": drain_seconds,
        }
    )
    check_worker_packages()
    from worker.main import run_worker

    sys.exit(run_worker(settings))
