"""The database's clock as SQL: epoch seconds, one clock for all workers, whatever their own clocks say."""

from typing import Any

from sqlalchemy import Double, ScalarSelect, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class now(FunctionElement[float]):  # noqa: N801  (reads as a SQL function)
    """Seconds since 1970 at this moment, not at the transaction's begin."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite_now(element: Any, compiler: Any, **kw: Any) -> str:
    # unixepoch('subsec') needs SQLite 3.42; Debian 12 ships 3.40. Julian days as a double are exact to 0.05 ms.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgresql_now(element: Any, compiler: Any, **kw: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


def now_once() -> ScalarSelect[float]:
    """The clock read once per statement: PostgreSQL refuses to search an index with a volatile function."""
    return select(now()).scalar_subquery()
