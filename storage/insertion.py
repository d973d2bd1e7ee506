"""Inserting many rows, leaving out those that are already there, in the way that is fast on each database."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import ARRAY, Connection, Dialect, Table, bindparam, column, func, select
from sqlalchemy.dialects import postgresql, sqlite

from storage.clock import now
from storage.tables import FreeText, escape


def insert_new(
    connection: Connection,
    table: Table,
    names: tuple[str, ...],
    rows: Sequence[tuple[Any, ...]],
    *,
    stamped: tuple[str, ...] = (),
) -> int:
    """Insert rows of the columns `names`; `stamped` are columns that get the time by the database's clock.

    Returns how many of them were not there yet. Values go to the driver as they are, so they are of plain types.
    """
    if not rows:
        return 0
    columns: list[Sequence[Any]] = list(zip(*rows, strict=True))
    # Most columns of a kind of Result are empty, and costs are by the value.
    filled = [i for i, values in enumerate(columns) if values.count(None) < len(rows)]
    names, columns = tuple(names[i] for i in filled), [columns[i] for i in filled]
    statement = _statement(connection.dialect, table, names, stamped)
    for i, name in enumerate(names):
        if isinstance(table.c[name].type, FreeText):
            columns[i] = [None if value is None else escape(value) for value in columns[i]]
    parameters: Any = list(zip(*columns, strict=True))
    if connection.dialect.name == "postgresql":
        # One array for each column: psycopg looks for every placeholder of a statement in Python, and with one for
        # each value that takes several times as long as the database needs for the rows. So does its way to write a
        # list as an array.
        parameters = {name: array_literal(values) for name, values in zip(names, columns, strict=True)}
    options = {"preserve_rowcount": True}
    return connection.exec_driver_sql(statement, parameters, execution_options=options).rowcount


# SQLAlchemy writes the statement, but the rows pass it by: its own way costs more for each of them than the database.
@lru_cache(maxsize=64)
def _statement(dialect: Dialect, table: Table, names: tuple[str, ...], stamped: tuple[str, ...]) -> str:
    if dialect.name != "postgresql":
        values: dict[str, Any] = {name: bindparam(name) for name in names}
        insert = sqlite.insert(table).values(values | {name: now() for name in stamped})
        # The placeholders' order is the table's.
        assert list(names) == [c.name for c in table.c if c.name in names], "names must be in the table's order"
        return str(insert.on_conflict_do_nothing().compile(dialect=dialect))
    arrays = [bindparam(name, type_=ARRAY(table.c[name].type)) for name in names]
    source = func.unnest(*arrays).table_valued(*(column(name, table.c[name].type) for name in names)).render_derived()
    selected = select(*source.c, *(now() for _ in stamped))
    from_arrays = postgresql.insert(table).from_select([*names, *stamped], selected)
    return str(from_arrays.on_conflict_do_nothing().compile(dialect=dialect))


def array_literal(values: Iterable[str | bytes | bool | int | float | None]) -> str:
    """As PostgreSQL reads an array of any type."""
    return "{" + ",".join([_element(value) for value in values]) + "}"


def _element(value: str | bytes | bool | int | float | None) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, bytes):
        return '"\\\\x' + value.hex() + '"'
    return repr(value)
