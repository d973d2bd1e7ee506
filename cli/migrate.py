"""`millrace migrate`."""

import click


@click.command("migrate", short_help="Create or update the database tables.")
def command() -> None:
    """Create Millrace's tables, or bring them to this version.

    \b
    Example:
      MILLRACE_DATABASE_URL=postgresql+psycopg://user:password@host/name millrace migrate
    """
    from protocol.settings import load_settings
    from storage.ledger import Ledger

    ledger = Ledger(load_settings().database_url)
    try:
        ledger.migrate()
    finally:
        ledger.close()
    click.echo(f"the tables in {ledger.url.render_as_string(hide_password=True)} are up to date")
