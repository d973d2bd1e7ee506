"""`millrace tune`."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from protocol.settings import EngineSettings
    from worker.engine.tuning import Point

#: What each list of limits is for.
_SETTINGS = {"sequences": "engine.max_num_seqs", "tokens": "engine.max_batch_tokens"}
#: Seconds: a day is more than anybody waits for one measurement.
_LEAST_S, _MOST_S = 0.01, 86_400.0
_HEADER = f"{'sequences':>10} {'tokens':>8} {'output tok/s':>13} {'all tok/s':>10} {'ms a token':>11} {'99 in 100':>10}"


def _numbers(context: click.Context, option: click.Parameter, text: str | None) -> list[int] | None:
    if text is None:
        return None
    from protocol.settings import LIMITS

    least, most = LIMITS[_SETTINGS[str(option.name)]]
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number <= most for number in numbers):
        raise click.BadParameter(f"{text!r} is no list of whole numbers from {least:,} to {most:,}, as in 64,256")
    return numbers


def _seconds(context: click.Context, option: click.Parameter, value: float) -> float:
    if not _LEAST_S <= value <= _MOST_S:  # nor is what is no number
        raise click.BadParameter(f"{value} is out of range: it must be from {_LEAST_S} to {_MOST_S:,.0f}")
    return value


@click.command("tune", short_help="Find this machine's best limits for a model.")
@click.argument("model", required=False)
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")
@click.option("--sequences", callback=_numbers, metavar="N,N,...", help="engine.max_num_seqs to try.")
@click.option("--tokens", callback=_numbers, metavar="N,N,...", help="engine.max_batch_tokens to try.")
@click.option(
    "--length",
    type=click.IntRange(1),
    metavar="N",
    default=256,
    show_default=True,
    help="Tokens of prompts and outputs.",
)
@click.option(
    "--seconds",
    type=float,
    callback=_seconds,
    metavar="SECONDS",
    default=10.0,
    show_default=True,
    help="For each measurement.",
)
@click.option(
    "--chart",
    type=click.Path(dir_okay=False, path_type=Path),
    default="tune.png",
    show_default=True,
    help="Where it is drawn, as PNG.",
)
@click.option(
    "--settings",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write to. Default: the one that is read, MILLRACE_CONFIG or millrace.toml.",
)
@click.option("--dry-run", is_flag=True, help="Write no settings.")
def command(
    model: str | None,
    device: str | None,
    sequences: list[int] | None,
    tokens: list[int] | None,
    length: int,
    seconds: float,
    chart: Path,
    settings: Path | None,
    dry_run: bool,
) -> None:
    """Measure throughput and latency at several limits of a step, and keep the best in the settings file.

    Prompts and outputs have --length tokens on average, and there is always more to do. Of limits that give nearly as
    many tokens, those that answer sooner are chosen. The chart shows all; Ctrl-C keeps what there is.

    \b
    Example:
      millrace tune models/millrace-tiny --sequences 16,64 --tokens 512,2048 --seconds 5
    """
    from cli.settings_file import check_settings_file, default_settings_file, write_settings
    from cli.worker_packages import check_worker_packages
    from protocol.settings import ENV_PREFIX, load_settings

    loaded = load_settings({"engine.model": model, "engine.device": device})
    check_worker_packages()
    _check_extra()
    path = settings or default_settings_file()
    _check_place("chart", chart)
    if not dry_run:
        _check_place("settings", path)
        check_settings_file(path, "engine")
    points = _measure_all(loaded.engine, sequences, tokens, seconds, length)
    if not points:
        raise ConfigurationError("nothing was measured")
    from worker.engine.tuning import best_of

    best = best_of(points)
    values = {"max_num_seqs": best.max_num_seqs, "max_batch_tokens": best.max_batch_tokens}
    click.echo("best: " + ", ".join(f"engine.{name} = {value}" for name, value in values.items()), err=True)
    if not dry_run:
        write_settings(path, "engine", values)
        click.echo(f"written to {path}", err=True)
        for name in values:
            if (variable := f"{ENV_PREFIX}ENGINE_{name.upper()}") in os.environ:
                click.echo(f"{variable} is set and wins over the file: unset it", err=True)
    from cli.tune_chart import draw_chart

    draw_chart(points, best, chart, loaded.served_model)
    click.echo(f"chart in {chart}", err=True)


def _measure_all(
    engine: "EngineSettings", sequences: list[int] | None, tokens: list[int] | None, seconds: float, length: int
) -> "list[Point]":
    """A line for each pair of limits as it comes; what there is when Ctrl-C ends it."""
    from worker.engine.tuning import Tuner

    tuner = Tuner(engine)
    all_sequences, all_tokens = tuner.limits
    pairs = _pairs(sequences or all_sequences, tokens or all_tokens)
    points: list[Point] = []
    click.echo(_HEADER)
    try:
        for num_sequences, num_tokens in pairs:
            try:
                point = tuner.measure(num_sequences, num_tokens, seconds, length)
            except ConfigurationError as error:
                click.echo(f"{num_sequences:>10} {num_tokens:>8} impossible here: {error}")
                continue
            points.append(point)
            click.echo(
                f"{point.max_num_seqs:>10} {point.max_batch_tokens:>8} {point.output_tokens_per_s:>13.0f} "
                f"{point.computed_tokens_per_s:>10.0f} {point.latency_ms:>11.2f} {point.slowest_ms:>10.2f}"
            )
    except KeyboardInterrupt:
        click.echo("stopped: the best of what there is", err=True)
    return points


def _pairs(sequences: list[int], tokens: list[int]) -> list[tuple[int, int]]:
    """(Sequences, tokens) of steps that can be: each Sequence needs its one token."""
    pairs = [(num_sequences, num) for num in tokens for num_sequences in sequences if num_sequences <= num]
    if not pairs:
        raise ConfigurationError(
            f"{min(sequences)} Sequences and more do not fit into steps of {max(tokens)} tokens and less: each of them "
            "needs a token, so give fewer --sequences or more --tokens"
        )
    return pairs


def _check_place(option: str, path: Path) -> None:
    """Before minutes of measuring."""
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigurationError(f"cannot write {path}: name a file where you may write with --{option} FILE")


def _check_extra() -> None:
    missing = [name for name in ("matplotlib", "tomlkit") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"millrace tune needs {' and '.join(missing)}: pip install '.[tune]' in Millrace's folder"
        )
