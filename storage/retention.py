"""Retention of answers: those that nobody used for long go, from SQL and from their hot copy in Redis.

Which Jobs go is told in storage.deletion.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import BigInteger, Connection, delete, func, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from storage.answers import AnswerCache
from storage.batches import batches
from storage.clock import now_once
from storage.ledger import Ledger
from storage.tables import answers

#: Answers that are looked at in one transaction.
_PAGE = 2000


class AnswerTotals(msgspec.Struct, frozen=True):
    """Answers in SQL, and how many bytes their contents take there."""

    num_answers: int
    num_bytes: int


class _num_bytes(FunctionElement[int]):  # noqa: N801  (reads as a SQL function)
    """Of a text or a blob."""

    type = BigInteger()
    inherit_cache = True


@compiles(_num_bytes, "sqlite")
def _sqlite_num_bytes(element: Any, compiler: Any, **kw: Any) -> str:
    # octet_length() needs SQLite 3.43; length() of a text counts characters.
    return f"length(CAST({compiler.process(element.clauses, **kw)} AS BLOB))"


@compiles(_num_bytes, "postgresql")
def _postgresql_num_bytes(element: Any, compiler: Any, **kw: Any) -> str:
    return f"octet_length({compiler.process(element.clauses, **kw)})"


_CONTENTS = (
    answers.c.key, answers.c.text, answers.c.logprobs, answers.c.score, answers.c.embedding, answers.c.classification,
)  # fmt: skip
_size = sum((func.coalesce(_num_bytes(column), 0) for column in _CONTENTS[1:]), start=_num_bytes(_CONTENTS[0]))


def count_answers(ledger: Ledger, unused_s: float = 0.0) -> AnswerTotals:
    """The answers that nobody used for so many seconds. Reads all of them. Raises DatabaseUnavailable."""
    totals = select(func.count(), func.sum(_size)).where(answers.c.used_at < now_once() - unused_s)

    def work(connection: Connection) -> AnswerTotals:
        num_answers, num_bytes = connection.execute(totals).one()
        return AnswerTotals(num_answers, int(num_bytes or 0))

    return ledger.read(work)


def delete_unused_answers(
    ledger: Ledger,
    cache: AnswerCache,
    unused_s: float,
    on_progress: Callable[[AnswerTotals], None] | None = None,
) -> AnswerTotals:
    """Delete the answers that nobody used for so many seconds; `on_progress` is told what has gone so far.

    They go from Redis too. Where that is away, their copies there stay until their time is over, and may be given out
    that long. After an error call it again. Raises DatabaseUnavailable.
    """
    position, total = b"", AnswerTotals(0, 0)
    while True:
        keys, unused = ledger.read(partial(_look_at_page, position=position, unused_s=unused_s))
        if unused:
            ledger.write(partial(_delete, keys=list(unused), unused_s=unused_s))
            cache.forget(unused)
            total = AnswerTotals(total.num_answers + len(unused), total.num_bytes + sum(unused.values()))
            if on_progress is not None:
                on_progress(total)
        if len(keys) < _PAGE:
            return total
        position = keys[-1]


def _look_at_page(connection: Connection, position: bytes, unused_s: float) -> tuple[Sequence[bytes], dict[bytes, int]]:
    """The next keys, and those of them that are unused with their sizes."""
    # In the order of the keys, which has an index; `used_at` has none, as every insert would pay for it.
    page = select(answers.c.key).where(answers.c.key > position).order_by(answers.c.key).limit(_PAGE)
    keys = connection.scalars(page).all()
    if not keys:
        return [], {}
    looked_at = answers.c.key.between(keys[0], keys[-1])
    unused = select(answers.c.key, _size).where(looked_at, answers.c.used_at < now_once() - unused_s)
    return keys, {key: size for key, size in connection.execute(unused)}  # noqa: C416  (rows are no pairs to mypy)


def _delete(connection: Connection, keys: Sequence[bytes], unused_s: float) -> None:
    is_unused = answers.c.used_at < now_once() - unused_s
    for batch in batches(keys):
        connection.execute(delete(answers).where(answers.c.key.in_(batch), is_unused))
