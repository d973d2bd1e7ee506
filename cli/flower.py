"""`millrace flower`."""

import click

#: Of the page of tasks: Flower's own order, which its page depends on, with the counts that stand for contents.
_COLUMNS = "name,uuid,state,result,received,runtime"


@click.command("flower", short_help="Show tasks and workers in a browser.")
@click.option(
    "--port", type=click.IntRange(0, 65535), metavar="N", default=5555, show_default=True, help="0 takes a free one."
)
@click.option("--address", metavar="ADDRESS", default="127.0.0.1", show_default=True, help="Where to listen.")
def command(port: int, address: str) -> None:
    """Show the tasks and workers of the broker in Flower, at http://127.0.0.1:5555. Ctrl-C stops it.

    Its pages and its API ask for MILLRACE_FLOWER_USER and MILLRACE_FLOWER_PASSWORD. Without a password it listens on
    the loopback alone, changes nothing, and has no API. It shows counts, never prompts or answers.

    \b
    Example:
      MILLRACE_BROKER_URL=redis://:password@host:6379/0 MILLRACE_FLOWER_PASSWORD=secret millrace flower
    """
    from importlib.util import find_spec

    from protocol.errors import BrokerUnavailable, ConfigurationError
    from protocol.settings import load_settings
    from storage.optional_redis import check_login

    settings = load_settings()
    if find_spec("flower") is None:
        raise ConfigurationError("Flower is not installed: pip install '.[flower]' in Millrace's folder")
    if settings.flower_password is None and not _is_loopback(address):
        raise ConfigurationError(
            f"Flower would show everybody who reaches {address} what this broker does: set MILLRACE_FLOWER_PASSWORD, "
            "or listen on 127.0.0.1"
        )
    if ":" in settings.flower_user:
        raise ConfigurationError("flower_user has a colon, which ends the name of a user: take another one")
    try:
        check_login(settings.broker_url)
    except BrokerUnavailable as error:
        click.echo(f"warning: {error}; until then there is nothing to see", err=True)
    login = None if settings.flower_password is None else f"{settings.flower_user}:{settings.flower_password}"
    _run(settings.broker_url, address, port, login)


def _is_loopback(address: str) -> bool:
    import ipaddress

    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _run(broker_url: str, address: str, port: int, login: str | None) -> None:
    """Within this process: on a command line of its own Flower's secrets could be read by everybody on the machine."""
    import logging
    import os
    import signal
    import sys

    from flower.app import Flower
    from flower.options import options
    from flower.urls import settings as pages

    from cli.main import INTERRUPTED
    from protocol.celery_app import make_watching_app
    from protocol.errors import ConfigurationError

    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("tornado.access").setLevel(logging.ERROR)
    options.address, options.port = address, port
    options.basic_auth = [login] if login is not None else []
    options.tasks_columns = _COLUMNS
    # Nobody has to log in, so another site's page in the same browser could give orders too.
    options.read_only = login is None
    flower = Flower(capp=make_watching_app(broker_url), options=options, **pages)
    try:
        chosen = flower.start_http_server()
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {address}, port {port}: {error.strerror}; give another --port or --address"
        ) from error
    click.echo(f"Flower is at http://{address}:{chosen}")

    def end(number: int, _frame: object) -> None:
        # Flower keeps nothing, and an orderly end would wait for threads that wait for a broker that is away.
        os._exit(INTERRUPTED if number == signal.SIGINT else 0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    flower.start()
