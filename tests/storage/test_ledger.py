"""Transactions, retries and the translation of SQL errors."""

import sqlite3
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, exc, select, text, update

from protocol.errors import ConfigurationError, DatabaseUnavailable
from storage.ledger import Ledger
from storage.tables import jobs
from tests.conftest import PostgresCluster
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
    with pytest.raises(ConfigurationError, match=rf"{tmp_path} cannot be used .*may write$"):
        open_ledger(f"sqlite:///{tmp_path}").migrate()


def test_migrate_refuses_a_file_that_is_no_database(tmp_path: Path, open_ledger: OpenLedger) -> None:
    (tmp_path / "notes.txt").write_text("these are notes, " * 1000)
    with pytest.raises(ConfigurationError, match=r"notes\.txt cannot be used .*: name a file"):
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


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"password": "secret"}, "password authentication failed"),
        ({"password": None}, "no password supplied"),
        ({"username": "nobody", "password": "secret"}, "authentication failed"),
        ({"database": "nowhere"}, 'database "nowhere" does not exist'),
    ],
)
def test_a_login_that_is_refused_is_a_mistake_in_the_settings(
    postgres_ledger: Ledger, open_ledger: OpenLedger, changed: dict[str, str | None], reason: str
) -> None:
    """Workers tried a wrong password again for ever."""
    password = str(postgres_ledger.url.password)
    wrong = postgres_ledger.url.set(**{**changed, "password": changed.get("password", password) or ""})  # type: ignore[arg-type]
    ledger = open_ledger(wrong.render_as_string(hide_password=False))
    with pytest.raises(ConfigurationError, match=reason) as caught:
        ledger.check_schema()
    told = "".join(traceback.format_exception(caught.value))
    assert "secret" not in told
    assert password not in told


def test_a_role_that_may_not_log_in_is_a_mistake_in_the_settings(
    postgres_ledger: Ledger, postgres_cluster: PostgresCluster, open_ledger: OpenLedger
) -> None:
    postgres_cluster.execute("CREATE ROLE a_group NOLOGIN PASSWORD 'word'")
    try:
        url = postgres_ledger.url.set(username="a_group", password="word")
        with pytest.raises(ConfigurationError, match="not permitted to log in"):
            open_ledger(url.render_as_string(hide_password=False)).check_schema()
    finally:
        postgres_cluster.execute("DROP ROLE a_group")


def test_a_database_that_is_away_while_it_is_restored_is_waited_for(
    postgres_ledger: Ledger, postgres_cluster: PostgresCluster
) -> None:
    """A login that has worked is no mistake: a worker keeps its results until it works again."""
    new_job(postgres_ledger)
    name = postgres_ledger.url.database
    postgres_ledger.close()
    postgres_cluster.execute(f"ALTER DATABASE {name} RENAME TO {name}_restored")
    try:
        with pytest.raises(DatabaseUnavailable, match=f'database "{name}" does not exist'):
            new_job(postgres_ledger)
    finally:
        postgres_cluster.execute(f"ALTER DATABASE {name}_restored RENAME TO {name}")
    assert new_job(postgres_ledger, "another").state == "submitting"


def test_a_server_that_has_become_a_standby_is_waited_for(
    postgres_ledger: Ledger, postgres_cluster: PostgresCluster
) -> None:
    """Also a session that stays read-only, because it was begun with the standby, is left behind afterwards."""
    ledger, name = postgres_ledger, postgres_ledger.url.database
    new_job(ledger)
    sessions = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    postgres_cluster.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    postgres_cluster.execute(sessions)

    with pytest.raises(DatabaseUnavailable, match="read-only transaction") as caught:
        new_job(ledger, f"identity {42}")
    assert "identity 42" not in "".join(traceback.format_exception(caught.value))
    assert num_rows(ledger, jobs) == 1

    postgres_cluster.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
    assert new_job(ledger, f"identity {42}").state == "submitting"


@pytest.mark.parametrize("sqlstate", ["08006", "53100", "57P03", "40001"])
def test_trouble_of_the_server_is_unavailable_once_retries_did_not_help(postgres_ledger: Ledger, sqlstate: str) -> None:
    tries = []

    def work(connection: Connection) -> None:
        tries.append(sqlstate)
        connection.execute(text(f"DO $$ BEGIN RAISE 'the trouble' USING ERRCODE = '{sqlstate}'; END $$"))

    with pytest.raises(DatabaseUnavailable, match="does not answer: the trouble"):
        postgres_ledger.write(work)
    assert len(tries) > 1


def test_an_sql_error_does_not_show_what_was_to_be_stored(ledger: Ledger) -> None:
    new_job(ledger)
    values = {"params": "a prompt", "state": "none"}
    with pytest.raises(exc.IntegrityError) as caught:
        ledger.write(lambda connection: connection.execute(update(jobs).values(values)))
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


def test_a_full_disk_is_unavailable_until_there_is_room(sqlite_ledger: Ledger) -> None:
    def limit(num_pages: int) -> None:
        # The one pooled connection keeps its setting.
        sqlite_ledger.read(lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count={num_pages}").close())

    def fill() -> None:
        for number in range(1000):
            new_job(sqlite_ledger, f"{number:0>4000}")

    limit(1)  # as many as there are
    with pytest.raises(DatabaseUnavailable, match="full"):
        fill()
    limit(1_000_000)
    assert new_job(sqlite_ledger, "x" * 4000).state == "submitting"


def test_a_sqlite_file_that_is_away_for_a_while_is_waited_for(tmp_path: Path, open_ledger: OpenLedger) -> None:
    """Its disk was unmounted under a running worker, which then gave its results up."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    ledger = open_ledger(f"sqlite:///{folder}/ledger.db")
    ledger.migrate()
    new_job(ledger)
    ledger.close()
    folder.rename(tmp_path / "unmounted")
    with pytest.raises(DatabaseUnavailable, match="unable to open"):
        new_job(ledger)
    (tmp_path / "unmounted").rename(folder)
    assert new_job(ledger, "another").state == "submitting"


def test_a_sqlite_file_that_becomes_read_only_is_waited_for(sqlite_ledger: Ledger) -> None:
    def set_read_only(value: str) -> None:
        sqlite_ledger.read(lambda connection: connection.exec_driver_sql(f"PRAGMA query_only = {value}").close())

    new_job(sqlite_ledger)
    set_read_only("ON")
    with pytest.raises(DatabaseUnavailable, match="readonly"):
        new_job(sqlite_ledger, "another")
    set_read_only("OFF")
    assert new_job(sqlite_ledger, "another").state == "submitting"


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


def test_a_server_that_vanished_without_a_word_is_noticed_within_seconds(
    postgres_url: str, open_ledger: OpenLedger
) -> None:
    """With the system's defaults a connection to a machine that has lost its power lasts for hours."""

    def options(connection: Connection) -> dict[str, str]:
        driver: Any = connection.connection.driver_connection
        found: dict[str, str] = driver.info.get_parameters()
        return found

    told = open_ledger(postgres_url).read(options)
    idle, interval, count = (int(told[f"keepalives_{name}"]) for name in ("idle", "interval", "count"))
    assert idle + interval * count <= 20
    assert int(told["tcp_user_timeout"]) <= 20_000
    assert open_ledger(f"{postgres_url}&tcp_user_timeout=0").read(options)["tcp_user_timeout"] == "0"
