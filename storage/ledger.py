"""Ledger: the SQL database as one object. Owns the engine, transactions, retries and the translation of SQL errors.

Knows the schema's version but nothing of Jobs, Chunks or Results.
"""

import random
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event, exc, make_url

from protocol.errors import ConfigurationError, DatabaseUnavailable, MillraceError
from storage import schema

T = TypeVar("T")

#: Milliseconds SQLite waits for another process's write transaction, which takes a few of them.
_BUSY_TIMEOUT_MS = 30_000
#: Seconds PostgreSQL may take to accept a connection.
_CONNECT_TIMEOUT_S = 10
#: A server that has vanished, with its machine or the network to it, sends no end of its connections: after some 20 s
#: without a sign of life they count as lost, and not after the hours or minutes of the system's defaults.
_LIVENESS = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 2, "tcp_user_timeout": 20_000}
#: Seconds before each new try of a transaction that lost its connection or a deadlock. A longer outage is left to the
#: caller, who knows whether anybody is waiting.
_RETRY_DELAYS_S = (0.05, 0.2, 1.0)
#: SQLite result codes of a file that cannot be used: PERM, READONLY, CANTOPEN, AUTH, NOTADB.
_SQLITE_MISCONFIGURED = {3, 8, 14, 23, 26}
#: SQLite result codes of the world's trouble: BUSY, LOCKED, NOMEM, IOERR, FULL, PROTOCOL.
_SQLITE_TROUBLE = {5, 6, 7, 10, 13, 15}
_OTHER_FILE = "name a file in a folder where you may write"
#: What PostgreSQL says to a login it will not accept: SQLSTATE 28P01, 28000 and 3D000. libpq hands no SQLSTATE on for
#: a connection that failed, so the words must do; a server of another language is tried again for ever.
_POSTGRES_MISCONFIGURED = re.compile(
    r"authentication failed for user|no password supplied|no pg_hba\.conf entry for|"
    r'role ".*" (does not exist|is not permitted to log in)|database ".*" does not exist'
)
#: disk_full, and what an extension of a file fails with.
_POSTGRES_FULL = {"53100", "58030"}
#: read_only_sql_transaction: the server has become a standby, and so have all sessions with it.
_READ_ONLY = "25006"


class Ledger:
    """A database of Jobs, Chunks, Results and answers. Thread-safe; not to be carried across a fork."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet. Raises ConfigurationError for a URL that names no usable database."""
        try:
            self.url = make_url(url)
            self._engine = _make_engine(self.url)
        except (exc.ArgumentError, exc.NoSuchModuleError) as error:
            raise ConfigurationError(
                "the database URL cannot be read: it must look like sqlite:///path/to/file.db or "
                "postgresql+psycopg://user:password@host/name"
            ) from error
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"the driver {error.name} for {self._shown_url} is not installed: pip install '.[postgres]' in "
                "Millrace's folder"
            ) from error
        self._writer = self._engine.execution_options(is_write=True)
        self._light_writer = self._engine.execution_options(is_write=True, is_flushed=False)
        self._proven: set[Engine] = set()

    def migrate(self) -> None:
        """Create the schema or bring it to this version. Safe when several processes do it at once.

        Raises ConfigurationError for a path that cannot be written or a schema that this Millrace cannot bring there,
        and DatabaseUnavailable.
        """
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigurationError(
                    f"cannot create the folder {self._file.parent} for the database ({error.strerror}): {_OTHER_FILE}"
                ) from error
        self.write(lambda connection: schema.migrate(connection, self._shown_url))

    def check_schema(self) -> None:
        """Raises ConfigurationError unless the schema is exactly this version's, and DatabaseUnavailable."""
        if self._file is not None and not self._file.exists():
            # Connecting would create an empty file in whatever folder this happens to be.
            raise ConfigurationError(f"there is no database at {self._file}: create it with `millrace migrate`")
        self.read(lambda connection: schema.check(connection, self._shown_url))

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction that only reads.

        Raises DatabaseUnavailable; ConfigurationError for a database that cannot be used and never could so far.
        """
        return self._transact(self._engine, work)

    def write(self, work: Callable[[Connection], T], *, is_flushed: bool = True) -> T:
        """Run `work` in a transaction and commit it. Raises as `read` does.

        With `is_flushed=False` the commit does not wait for the disk, and if the database's machine loses power within
        the next moment it may never have been: for what nobody is told of but those who would notice.

        `work` runs again when the connection or a deadlock was lost, also when the COMMIT itself may have landed: it
        must find out for itself what is already there.
        """
        return self._transact(self._writer if is_flushed else self._light_writer, work)

    def close(self) -> None:
        """Close all pooled connections."""
        self._engine.dispose()

    @property
    def _file(self) -> Path | None:
        return Path(self.url.database or "") if self.url.get_backend_name() == "sqlite" else None

    @property
    def _shown_url(self) -> str:
        return self.url.render_as_string(hide_password=True)

    def _transact(self, engine: Engine, work: Callable[[Connection], T]) -> T:
        for delay_s in (*_RETRY_DELAYS_S, None):
            try:
                with engine.begin() as connection:
                    outcome = work(connection)
                self._proven.add(engine)
                return outcome
            except (exc.DBAPIError, exc.TimeoutError, sqlite3.Error) as error:
                translated = self._translate(error, is_proven=engine in self._proven)
                if translated is None:
                    raise
                if delay_s is None or not _may_pass_soon(error):
                    raise translated from error
            # Two that collided once would collide again if they waited equally long.
            time.sleep(delay_s * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")

    def _translate(self, error: Exception, *, is_proven: bool) -> MillraceError | None:
        """Our error for a foreign one; None where the fault is ours.

        Settings that have worked are not wrong: then a disk was mounted read-only, or a database is being restored.
        """
        cause = error.orig if isinstance(error, exc.DBAPIError) else error
        reason = str(cause).strip()
        if isinstance(cause, sqlite3.Error):
            # The low byte is the primary code; a connect listener's error has none of SQLAlchemy's wrapping.
            code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
            if code in _SQLITE_MISCONFIGURED and not is_proven:
                way_out = _OTHER_FILE if code == sqlite3.SQLITE_NOTADB else f"let it be written to, or {_OTHER_FILE}"
                return ConfigurationError(f"the database {self._file} cannot be used ({reason}): {way_out}")
            if code == sqlite3.SQLITE_FULL:
                return DatabaseUnavailable(
                    f"the database {self._file} takes no more ({reason}): free some space on its disk; what is stored "
                    "stays, and the same command goes on"
                )
            if code in _SQLITE_MISCONFIGURED | _SQLITE_TROUBLE:
                return DatabaseUnavailable(
                    f"the database {self._file} does not answer ({reason}): look at its disk, and for a process "
                    "that keeps it locked; the same command goes on"
                )
            return None
        is_trouble = isinstance(error, exc.TimeoutError | exc.OperationalError | exc.InterfaceError)
        if not is_trouble and not (isinstance(error, exc.DBAPIError) and error.connection_invalidated):
            return None
        is_refused = getattr(cause, "sqlstate", None) is None and _POSTGRES_MISCONFIGURED.search(reason)
        if is_refused and not is_proven:
            return ConfigurationError(
                f"the database {self._shown_url} cannot be used: {reason}; correct user, password and name in "
                "MILLRACE_DATABASE_URL"
            )
        if getattr(cause, "sqlstate", None) in _POSTGRES_FULL:
            way_out = "make room on the server's disk; what is stored stays, and the same command goes on"
        else:
            way_out = "start it, or set MILLRACE_DATABASE_URL to where it runs"
        return DatabaseUnavailable(f"the database {self._shown_url} does not answer: {reason}; {way_out}")


def _may_pass_soon(error: Exception) -> bool:
    # SQLite's busy timeout and the pool's own have been waited for already.
    return isinstance(error, exc.DBAPIError) and not isinstance(error.orig, sqlite3.Error)


def _make_engine(url: URL) -> Engine:
    # Parameters are prompts and answers: they must not get into error messages and from there into logs.
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:") or url.query.get("mode") == "memory":
            raise ConfigurationError(
                f"{url} is a database in memory, and the ledger must outlive its process: name a file, as in "
                "sqlite:///millrace.db"
            )
        engine = create_engine(url, hide_parameters=True)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if url.get_backend_name() != "postgresql":
        raise ConfigurationError(f"{url.get_backend_name()} databases are not supported: use SQLite or PostgreSQL")
    defaults: dict[str, Any] = {"connect_timeout": _CONNECT_TIMEOUT_S, "application_name": "millrace", **_LIVENESS}
    engine = create_engine(
        url,
        hide_parameters=True,
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,
        connect_args={name: value for name, value in defaults.items() if name not in url.query},
    )
    event.listen(engine, "begin", _begin_postgresql)
    event.listen(engine, "handle_error", _hide_row)
    event.listen(engine, "handle_error", _leave_standby)
    return engine


def _hide_row(context: ExceptionContext) -> None:
    # PostgreSQL appends the whole failing row as the error's detail, and psycopg makes it part of the message.
    primary = getattr(getattr(context.original_exception, "diag", None), "message_primary", None)
    if primary and context.sqlalchemy_exception is not None:
        told = str(context.original_exception)
        context.sqlalchemy_exception.args = (str(context.sqlalchemy_exception.args[0]).replace(told, primary),)
        context.original_exception.args = (primary,)


def _leave_standby(context: ExceptionContext) -> None:
    # A session begun with a standby stays read-only whatever becomes of the server: all of the pool's are closed, and
    # the next try finds the primary, by its address or by the URL's target_session_attrs.
    if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
        context.is_disconnect = True


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    # SQLAlchemy begins transactions, see _begin_sqlite; the driver would not begin one for a SELECT or for DDL.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA synchronous = FULL")
    if cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        _switch_to_wal(cursor)
    cursor.close()


def _switch_to_wal(cursor: sqlite3.Cursor) -> None:
    # Only a new file needs it, but then for a moment alone, and SQLite does not apply the busy timeout to that.
    deadline = time.monotonic() + _BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.005, 0.02))


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later cannot wait for its turn to write: SQLite fails it at once.
    options = connection.get_execution_options()
    if not options.get("is_write", False):
        connection.exec_driver_sql("BEGIN")
        return
    # In WAL mode only FULL makes a committed Result survive a power cut; with NORMAL the next one that is FULL does.
    connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if options.get('is_flushed', True) else 'NORMAL'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_postgresql(connection: Connection) -> None:
    if not connection.get_execution_options().get("is_flushed", True):
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
