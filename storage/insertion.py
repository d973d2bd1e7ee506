"""Inserting many rows, leaving out those that are already there, in the way that is fast on each database."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ARRAY, Column, ColumnElement, Connection, Row, Table, bindparam, column, func, select
from sqlalchemy.dialects import postgresql, sqlite


def insert_new(
    connection: Connection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    *,
    computed: Mapping[str, ColumnElement[Any]] | None = None,
    returning: Sequence[Column[Any]] = (),
) -> Sequence[Row[Any]]:
    """Insert rows with equal keys each; `computed` are columns whose value the database computes.

    Returns the columns `returning` of those rows that were not there yet.
    """
    computed = computed or {}
    if not rows:
        return []
    if connection.dialect.name == "postgresql":
        statement, parameters = _from_arrays(table, rows, computed)
        inserted = connection.execute(statement.on_conflict_do_nothing().returning(*returning), parameters)
    else:
        plain = sqlite.insert(table).values(**computed).on_conflict_do_nothing()
        inserted = connection.execute(plain.returning(*returning), rows)
    return inserted.all() if returning else []


def _from_arrays(
    table: Table, rows: Sequence[Mapping[str, Any]], computed: Mapping[str, ColumnElement[Any]]
) -> tuple[postgresql.Insert, dict[str, list[Any]]]:
    # One array for each column: psycopg looks for every placeholder of a statement in Python, and with one for each
    # value that takes several times as long as the database needs for the rows.
    names = list(rows[0])
    arrays = [bindparam(name, type_=ARRAY(table.c[name].type)) for name in names]
    source = func.unnest(*arrays).table_valued(*(column(name, table.c[name].type) for name in names)).render_derived()
    selected = select(*source.c, *computed.values())
    statement = postgresql.insert(table).from_select([*names, *computed], selected)
    return statement, {name: [row[name] for row in rows] for name in names}
