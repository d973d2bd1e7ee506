"""Transactions, retries and the translation of SQL errors."""

import sqlite3
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection, exc, insert, select, text, update

from protocol.errors import ConfigurationError, DatabaseUnavailable
from storage.ledger import Ledger
from storage.tables import jobs
from tests.storage.samples import new_job, num_rows, run_threads

OpenLedger = Callable[[str], Ledger]


def test_migrate_creates_the_parent_folders_of_a_sqlite_file(tmp_path: Path, open_ledger: OpenLedger) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path}/state/of/the/run/ledger.db")
    ledger.migrate()
    ledger.check_schema()
    assert (tmp_path / "state/of/the/run/ledger.db").is_file()


def test_sqlite_writes_ahead_survives_power_cuts_and_checks_foreign_keys(sqlite_ledger: Ledger) -> None:
    def pragma(name: str) -> object:
        return sqlite_ledger.read(lambda connection: connection.execute(text(f"PRAGMA {name}")).scalar_one())

    assert {name: pragma(name) for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")} == {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL
        "foreign_keys": 1,
        "busy_timeout": 30_000,
    }


@pytest.mark.parametrize("inside", ["a file/ledger.db", "a file/deeper/ledger.db"])
def test_migrate_names_the_folder_that_cannot_be_created(tmp_path: Path, inside: str, open_ledger: OpenLedger) -> None:
    (tmp_path / "a file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"cannot create the folder .*a file"):
        open_ledger(f"sqlite:///{tmp_path}/{inside}").migrate()


def test_migrate_refuses_a_folder_in_the_place_of_the_file(tmp_path: Path, open_ledger: OpenLedger) -> None:
    with pytest.raises(ConfigurationError, match=f"the database {tmp_path} cannot be used"):
        open_ledger(f"sqlite:///{tmp_path}").migrate()


def test_migrate_refuses_a_file_that_is_no_database(tmp_path: Path, open_ledger: OpenLedger) -> None:
    (tmp_path / "notes.txt").write_text("these are notes, " * 1000)
    with pytest.raises(ConfigurationError, match=r"notes\.txt cannot be used"):
        open_ledger(f"sqlite:///{tmp_path}/notes.txt").migrate()


def test_migrate_refuses_a_read_only_database(sqlite_ledger: Ledger, open_ledger: OpenLedger) -> None:
    sqlite_ledger.close()
    with pytest.raises(ConfigurationError, match="readonly"):
        open_ledger(f"sqlite:///file:{sqlite_ledger.url.database}?mode=ro&uri=true").write(
            lambda connection: connection.execute(text("UPDATE jobs SET state = 'running'"))
        )


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite://", "must outlive its process"),
        ("sqlite:///:memory:", "must outlive its process"),
        ("mysql+pymysql://u:secret@host/name", "not supported"),
        ("oracle://u:secret@host/name", "not supported"),
        ("nonsense://u:secret@host/name", "not supported"),
        ("postgresql+nonsense://u:secret@host/name", "cannot be read"),
        ("ledger.db", "cannot be read"),
    ],
)
def test_a_url_that_names_no_usable_database_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as caught:
        Ledger(url)
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_an_absent_server_is_unavailable_and_the_password_is_not_shown(open_ledger: OpenLedger) -> None:
    ledger = open_ledger("postgresql+psycopg://millrace:secret@127.0.0.1:1/name")
    with pytest.raises(DatabaseUnavailable, match=r"millrace:\*\*\*@127.0.0.1:1/name") as caught:
        ledger.check_schema()
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_a_wrong_password_is_not_shown(postgres_ledger: Ledger, open_ledger: OpenLedger) -> None:
    wrong = postgres_ledger.url.set(password="secret").render_as_string(hide_password=False)
    with pytest.raises(DatabaseUnavailable, match="password authentication failed") as caught:
        open_ledger(wrong).check_schema()
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_an_sql_error_does_not_show_what_was_to_be_stored(ledger: Ledger) -> None:
    job = new_job(ledger)
    row = {"id": job.id, "tenant": "t", "identity": "i", "model": "m", "params": "a prompt", "state": "none"}
    with pytest.raises(exc.IntegrityError) as caught:
        ledger.write(lambda connection: connection.execute(insert(jobs).values({**row, "created_at": 0.0})))
    assert "ck_jobs_state" in str(caught.value) or "CHECK constraint failed" in str(caught.value)
    assert "a prompt" not in "".join(traceback.format_exception(caught.value))


def test_a_database_that_stays_locked_is_unavailable(sqlite_ledger: Ledger) -> None:
    # The one pooled connection keeps its setting: no need to wait for 30 seconds.
    sqlite_ledger.read(lambda connection: connection.exec_driver_sql("PRAGMA busy_timeout = 20").close())
    other = sqlite3.connect(str(sqlite_ledger.url.database), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailable, match="locked"):
        new_job(sqlite_ledger)
    other.execute("ROLLBACK")
    other.close()
    assert new_job(sqlite_ledger).state == "submitting"


def test_sqlite_transactions_that_read_before_they_write_take_turns(sqlite_ledger: Ledger) -> None:
    job = new_job(sqlite_ledger)

    def increment(connection: Connection) -> None:
        number = connection.execute(select(jobs.c.num_lines).where(jobs.c.id == job.id)).scalar() or 0
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(num_lines=number + 1))

    def increment_often() -> None:
        for _ in range(25):
            sqlite_ledger.write(increment)

    run_threads([increment_often] * 4)

    assert sqlite_ledger.read(lambda connection: connection.execute(select(jobs.c.num_lines)).scalar_one()) == 100


def test_a_failed_transaction_leaves_nothing_behind(ledger: Ledger) -> None:
    def fail_halfway(connection: Connection) -> None:
        connection.execute(text("DELETE FROM jobs"))
        raise ValueError("halfway")

    new_job(ledger)
    with pytest.raises(ValueError, match="halfway"):
        ledger.write(fail_halfway)
    assert num_rows(ledger, jobs) == 1


def test_a_transaction_runs_again_when_the_server_drops_the_connection(postgres_ledger: Ledger) -> None:
    tries = []

    def work(connection: Connection) -> int:
        tries.append(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())
        if len(tries) == 1:
            connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        return connection.execute(text("SELECT 42")).scalar_one()  # type: ignore[no-any-return]

    assert postgres_ledger.write(work) == 42
    assert len(set(tries)) == 2


def test_transactions_that_deadlock_both_succeed(postgres_ledger: Ledger) -> None:
    first, second = new_job(postgres_ledger, "1").id, new_job(postgres_ledger, "2").id
    both_locked = threading.Barrier(2)

    def lock_in_order(ids: tuple[str, str]) -> None:
        tries = 0

        def work(connection: Connection) -> None:
            nonlocal tries
            tries += 1
            for job_id in ids:
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(num_lines=tries))
                if tries == 1 and job_id == ids[0]:
                    both_locked.wait(30)

        postgres_ledger.write(work)

    run_threads([lambda: lock_in_order((first, second)), lambda: lock_in_order((second, first))])

    counts = postgres_ledger.read(lambda connection: connection.execute(select(jobs.c.num_lines)).scalars().all())
    assert len(set(counts)) == 1
