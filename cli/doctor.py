"""`millrace doctor`: what works here and what does not, each with its way out."""

import sys
from collections.abc import Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING

import click

from cli.counted import counted

if TYPE_CHECKING:
    from cli.finding import Finding
    from protocol.settings import Settings

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@click.command("doctor", short_help="Check servers, device, model and disks.")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each line.")
@click.option("--worker", "is_worker", is_flag=True, help="Only: does a worker on this machine answer? For containers.")
def command(model: str | None, as_json: bool, is_worker: bool) -> None:
    """Check Redis, the database, workers, packages, device, attention, model and disks.

    MODEL is a folder with a model, or a name on the model hub; without it, the one of the settings. Nothing is
    downloaded.

    Changes nothing. Each line says what is wrong and what to do about it. The exit code is 1 when a check failed;
    warnings leave it 0.

    \b
    Example:
      millrace doctor models/millrace-tiny
    """
    num_failed = num_warnings = 0
    for finding in _own_worker(model) if is_worker else _everything(model):
        num_failed += finding.state == "failed"
        num_warnings += finding.state == "warning"
        _show(finding, as_json)
    if not as_json and not is_worker:
        click.echo(f"{num_failed} failed, {counted(num_warnings, 'warning')}", err=True)
    sys.exit(1 if num_failed else 0)


def _everything(model: str | None) -> "Iterator[Finding]":
    from cli.finding import findings
    from cli.machine_checks import check_device, check_disks, check_model, check_packages
    from cli.server_checks import check_database, check_redis, check_workers

    yield from findings("packages", check_packages)
    settings = yield from _settings(model)
    if settings is None:
        return
    for name, check in (
        ("redis", check_redis),
        ("database", check_database),
        ("workers", check_workers),
        ("device", check_device),
        ("model", check_model),
        ("disk", check_disks),
    ):
        yield from findings(name, partial(check, settings))


def _own_worker(model: str | None) -> "Iterator[Finding]":
    from cli.finding import findings
    from cli.server_checks import check_own_worker

    settings = yield from _settings(model, is_quiet=True)
    if settings is not None:
        yield from findings("worker", partial(check_own_worker, settings))


def _settings(model: str | None, is_quiet: bool = False) -> "Generator[Finding, None, Settings | None]":
    """Generates one finding, and returns the settings or None."""
    import os

    from cli.finding import failed, ok
    from protocol.errors import ConfigurationError
    from protocol.settings import CONFIG_VARIABLE, DEFAULT_CONFIG_FILE, ENV_PREFIX, load_settings

    try:
        settings = load_settings({"engine.model": model})
    except ConfigurationError as error:
        yield failed("settings", str(error))
        return None
    if not is_quiet:
        file = os.environ.get(CONFIG_VARIABLE, DEFAULT_CONFIG_FILE)
        named = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name != CONFIG_VARIABLE)
        sources = [file] * os.path.exists(file) + named
        yield ok("settings", f"from {', '.join(sources)}" if sources else "all are the defaults")
    return settings


def _show(finding: "Finding", as_json: bool) -> None:
    import msgspec

    if as_json:
        click.echo(msgspec.json.encode(finding))
        return
    state = click.style(finding.state.ljust(8), fg=_COLOURS[finding.state])
    click.echo(f"{state} {finding.name:<18} {finding.facts}")
    if finding.way_out is not None:
        click.echo(f"{'':<8} {'':<18} -> {finding.way_out}")
