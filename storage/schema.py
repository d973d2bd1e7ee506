"""The schema's version: bringing a database to it and checking that it is there. Alembic's only caller."""

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, inspect, text

from protocol.errors import ConfigurationError
from storage.tables import metadata

#: Alembic's own default would collide with an application that keeps its tables in the same database.
VERSION_TABLE = "millrace_schema"
#: Names the PostgreSQL advisory lock: any number nobody else uses.
_MIGRATION_LOCK = 0x6D696C6C72616365


def migrate(connection: Connection, shown_url: str) -> None:
    """Bring the schema to the newest version within the transaction of `connection`.

    SQLite's write transaction already keeps a second process waiting. Raises ConfigurationError for a newer schema, and
    for one that only calls itself the newest.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
    config = _config()
    if _is_newer(connection, config):
        raise ConfigurationError(_newer(shown_url))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    _check_tables(connection, shown_url)


def check(connection: Connection, shown_url: str) -> None:
    """Raises ConfigurationError unless the schema is at the newest version this Millrace knows, and all of it there."""
    config = _config()
    found = _found(connection)
    if not found:
        raise ConfigurationError(
            f"the database {shown_url} has no Millrace tables: create them with `millrace migrate`"
        )
    if found == set(ScriptDirectory.from_config(config).get_heads()):
        _check_tables(connection, shown_url)
        return
    if _is_newer(connection, config):
        raise ConfigurationError(_newer(shown_url))
    raise ConfigurationError(
        f"the tables in {shown_url} are from an older Millrace: bring them up to date with `millrace migrate`"
    )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "storage:migrations")
    return config


def _found(connection: Connection) -> set[str]:
    return set(MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_heads())


def _is_newer(connection: Connection, config: Config) -> bool:
    script = ScriptDirectory.from_config(config)
    try:
        for revision in _found(connection):
            script.get_revision(revision)
    except CommandError:
        return True
    return False


def _check_tables(connection: Connection, shown_url: str) -> None:
    """A version that was still being made has the number of the finished one."""
    there = {
        table: {str(column["name"]) for column in columns}
        for (_, table), columns in inspect(connection).get_multi_columns(filter_names=[*metadata.tables]).items()
    }
    wrong = []
    for name, table in metadata.tables.items():
        expected, found = set(table.columns.keys()), there.get(name)
        if found is None:
            wrong.append(f"no table {name}")
            continue
        wrong += [f"no column {name}.{column}" for column in sorted(expected - found)]
        wrong += [f"an unknown column {name}.{column}" for column in sorted(found - expected)]
    if wrong:
        raise ConfigurationError(
            f"the tables in {shown_url} were made by another state of Millrace, and no migration leads from there "
            f"({', '.join(wrong)}): use another database, or delete this one with the Jobs and Results in it"
        )


def _newer(shown_url: str) -> str:
    return (
        f"the tables in {shown_url} are from a newer Millrace, and this one's `millrace migrate` cannot take them "
        "back: upgrade Millrace here"
    )
