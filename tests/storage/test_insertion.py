"""Rows that go past SQLAlchemy must arrive as they are."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from storage.insertion import array_literal
from storage.ledger import Ledger

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (
            "text",
            st.lists(st.none() | TEXTS | st.sampled_from(["NULL", "null", "", '"', "\\", "{}", "a,b", "\n", " x "])),
        ),
        ("bytea", st.lists(st.none() | st.binary())),
        ("bigint", st.lists(st.none() | st.integers(-(2**63), 2**63 - 1))),
        ("double precision", st.lists(st.none() | st.floats(allow_nan=False))),
        ("boolean", st.lists(st.none() | st.booleans())),
    ],
)
def test_postgresql_reads_an_array_literal_as_the_values_it_was_made_of(
    postgres_url: str, open_ledger: Any, kind: str, values: st.SearchStrategy[list[Any]]
) -> None:
    ledger: Ledger = open_ledger(postgres_url)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(values)
    def check(given_values: list[Any]) -> None:
        def work(connection: Connection) -> list[Any]:
            query = text(
                f"SELECT value FROM unnest(CAST(:array AS {kind}[])) WITH ORDINALITY AS a(value, n) ORDER BY n"
            )
            return [row.value for row in connection.execute(query, {"array": array_literal(given_values)})]

        assert ledger.read(work) == given_values

    check()
