"""Migrations lead to exactly what tables.py describes, and a database of another version is refused."""

import multiprocessing
import re
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from protocol.errors import ConfigurationError
from storage.ledger import Ledger
from storage.schema import VERSION_TABLE
from storage.tables import metadata
from tests.conftest import PostgresCluster


def _catalogue(connection: Connection) -> dict[str, str]:
    """Everything the database itself says about the schema, columns in the order of their names."""
    if connection.dialect.name == "sqlite":
        # The order of constraints within CREATE TABLE means nothing.
        rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")).all()
        return {
            name: " ".join(sorted(re.split(r",\s*\n", sql.strip().removesuffix(")").strip()))) for name, sql in rows
        }
    statements = (
        "SELECT 'index ' || indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
        "SELECT 'constraint ' || conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid > 0",
        "SELECT table_name || '.' || column_name, concat_ws(' ', ordinal_position, data_type, is_nullable, "
        "column_default, character_maximum_length) FROM information_schema.columns WHERE table_schema = 'public'",
    )
    return {name: definition for statement in statements for name, definition in connection.execute(text(statement))}


def test_migrating_yields_the_tables_as_alembic_compares_them(ledger: Ledger) -> None:
    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
        )
        return list(compare_metadata(context, metadata))

    assert ledger.read(differences) == []


def test_migrating_yields_the_same_catalogue_as_creating_the_tables(ledger: Ledger) -> None:
    def recreate(connection: Connection) -> None:
        metadata.drop_all(connection)
        metadata.create_all(connection)

    migrated = ledger.read(_catalogue)
    ledger.write(recreate)

    assert ledger.read(_catalogue) == migrated
    # The partial indexes' conditions are in it, which alembic's own comparison leaves out.
    assert any("WHERE" in definition for definition in migrated.values())


def test_check_schema_accepts_a_migrated_database_and_migrating_again_changes_nothing(ledger: Ledger) -> None:
    before = ledger.read(_catalogue)
    ledger.migrate()
    ledger.check_schema()
    assert ledger.read(_catalogue) == before


def test_check_schema_names_the_command_when_there_is_no_sqlite_file(
    tmp_path: Path, open_ledger: Callable[[str], Ledger]
) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(ConfigurationError, match="millrace migrate"):
        ledger.check_schema()
    assert not list(tmp_path.iterdir())


def test_check_schema_names_the_command_when_the_database_is_empty(postgres_cluster: PostgresCluster) -> None:
    name = postgres_cluster.create("template1")
    ledger = Ledger(postgres_cluster.url(name))
    with pytest.raises(ConfigurationError, match="millrace migrate"):
        ledger.check_schema()
    ledger.close()
    postgres_cluster.drop(name)


def test_check_schema_refuses_a_newer_database_and_migrate_leaves_it_alone(ledger: Ledger) -> None:
    ledger.write(lambda connection: connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")))
    with pytest.raises(ConfigurationError, match=r"newer Millrace.*upgrade"):
        ledger.check_schema()
    with pytest.raises(ConfigurationError, match=r"newer Millrace.*upgrade"):
        ledger.migrate()


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("ALTER TABLE answers RENAME COLUMN used_at TO made_at", "no column answers.used_at, an unknown column"),
        ("DROP TABLE dead_letters", "no table dead_letters"),
    ],
)
def test_tables_of_an_earlier_state_are_named_with_the_way_out(ledger: Ledger, statement: str, said: str) -> None:
    ledger.write(lambda connection: connection.execute(text(statement)))
    for use in (ledger.check_schema, ledger.migrate):
        with pytest.raises(ConfigurationError, match=rf"another state of Millrace.*{said}.*: use another database"):
            use()


def test_check_schema_refuses_a_database_whose_version_was_taken_away(ledger: Ledger) -> None:
    ledger.write(lambda connection: connection.execute(text(f"DELETE FROM {VERSION_TABLE}")))
    with pytest.raises(ConfigurationError, match="millrace migrate"):
        ledger.check_schema()


def _migrate_at_once(url: str, barrier: Barrier) -> None:
    ledger = Ledger(url)
    barrier.wait(60)
    ledger.migrate()
    ledger.check_schema()
    ledger.close()


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_migrate_is_safe_when_processes_start_it_at_the_same_time(
    backend: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url, name, cluster = f"sqlite:///{tmp_path}/new/ledger.db", "", None
    if backend == "postgresql":
        cluster = request.getfixturevalue("postgres_cluster")
        name = cluster.create("template1")
        url = cluster.url(name)
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(4)
    processes = [spawn.Process(target=_migrate_at_once, args=(url, barrier)) for _ in range(4)]

    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    if cluster is not None:
        cluster.drop(name)
