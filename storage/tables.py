"""The ledger's tables, each column described here once. `storage/migrations` must lead to exactly this.

Times are epoch seconds by the database's clock. States are stored as words, so that the ledger can be read with any
SQL client.
"""

import re
from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
)
from sqlalchemy.types import TypeDecorator

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_UNSTORABLE = re.compile("[\x00\x1a\ud800-\udfff]")
_ESCAPED = re.compile("\x1a([0-9a-f]{4})")


class FreeText(TypeDecorator[str]):
    """Any Python string, read back exactly.

    PostgreSQL refuses NUL and both databases refuse lone surrogates, and a model may well print either; one such
    answer must not fail a whole commit. They are stored as U+001A and four hex digits, all other text as it is.
    """

    impl = Text
    cache_ok = True

    # Processors and not process_bind_param and process_result_value: those cost three calls for every value.
    def bind_processor(self, dialect: Dialect) -> Callable[[str | None], str | None]:
        return escape

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[str | None], str | None]:
        return unescape


def escape(text: str | None) -> str | None:
    """As FreeText stores it."""
    if text is None or (text.isascii() and text.isprintable()):
        return text
    return _UNSTORABLE.sub(lambda found: f"\x1a{ord(found[0]):04x}", text)


def unescape(text: str | None) -> str | None:
    """The inverse of `escape`."""
    if text is None or "\x1a" not in text:
        return text
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)


#: SQLite numbers rows by itself only in a column of type INTEGER, which holds 64 bits there.
_RowId = BigInteger().with_variant(Integer, "sqlite")

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(16), primary_key=True),  # random hex
    Column("tenant", FreeText, nullable=False),
    Column("identity", FreeText, nullable=False),  # what makes a second submit of the same input the same Job
    Column("model", FreeText, nullable=False),  # the served name, as in the queue's name
    Column("params", Text, nullable=False),  # the Job's default SamplingParams, JSON
    Column("priority", Integer, nullable=False),  # protocol.priority.rank of its class
    Column("state", String(16), nullable=False),  # submitting | running | finished | cancelled | deleting
    Column("is_asked", Boolean, nullable=False),  # made for prompts whose caller waits; lists leave it out
    Column("num_lines", BigInteger),  # lines of the input, NULL until the Job is sealed
    Column("created_at", Double, nullable=False),
    Column("ended_at", Double),  # when it became finished or cancelled
    # What it was closed with, see storage.completeness; NULL unless it is finished.
    Column("num_results", BigInteger),
    Column("num_errors", BigInteger),  # of num_results
    Column("num_cached", BigInteger),  # of num_results
    Column("digest", String(64)),  # of all Results, hex
    CheckConstraint("state IN ('submitting', 'running', 'finished', 'cancelled', 'deleting')", name="state"),
)

# A partial index is used only where the query repeats its condition word for word, hence literals.
#: Whether the Job is there at all: what is being deleted is none any more, and its identity may be another's.
is_there = jobs.c.state != literal_column("'deleting'")

#: Whether it was submitted as a Job: of the others there may be very many.
is_submitted = ~jobs.c.is_asked

Index(
    "ix_jobs_tenant_created_at",
    jobs.c.tenant,
    jobs.c.created_at,
    sqlite_where=is_submitted,
    postgresql_where=is_submitted,
)

#: Whether the Job's Chunks may be worked on.
is_open = jobs.c.state.in_([literal_column("'submitting'"), literal_column("'running'")])

Index(
    "ix_jobs_open",
    jobs.c.model,
    jobs.c.priority,
    jobs.c.created_at,
    sqlite_where=is_open,
    postgresql_where=is_open,
)
Index(
    "uq_jobs_tenant_identity",
    jobs.c.tenant,
    jobs.c.identity,
    unique=True,
    sqlite_where=is_there,
    postgresql_where=is_there,
)

chunks = Table(
    "chunks",
    metadata,
    Column("id", _RowId, primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("tenant", FreeText, nullable=False),  # the Job's
    Column("model", FreeText, nullable=False),  # the Job's
    Column("first_line", BigInteger, nullable=False),
    Column("last_line", BigInteger, nullable=False),
    Column("num_requests", Integer, nullable=False),  # lines of the span that could be read
    Column("state", String(16), nullable=False),  # waiting | leased | finished | cancelled
    Column("owner", FreeText),  # of the lease; kept when the Chunk is finished
    Column("leased_until", Double),  # the owner may go on after this, but anybody may take the Chunk
    Column("attempt", Integer, nullable=False),  # how often it was claimed; fences late writers
    Column("due_at", Double),  # when the first of its Requests is late, see storage.overdue; NULL: none will be
    Column("created_at", Double, nullable=False),
    # Counted in the transaction that writes the Results, so that a Job's progress never needs a scan of them.
    Column("num_ok", Integer, nullable=False),  # Results with an answer, one per sample
    Column("num_error", Integer, nullable=False),  # Results with a failure
    Column("num_cached", Integer, nullable=False),  # of num_ok, those whose answer was known
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("computed_tokens", BigInteger, nullable=False),  # of completion_tokens, those that were not cached
    Column("digest", LargeBinary(32), nullable=False),  # of the Results, see storage.digest
    UniqueConstraint("job_id", "first_line"),
    CheckConstraint("state IN ('waiting', 'leased', 'finished', 'cancelled')", name="state"),
    # An id that is still in a queue message must never come to mean another Chunk.
    sqlite_autoincrement=True,
)

is_waiting = chunks.c.state == literal_column("'waiting'")
is_leased = chunks.c.state == literal_column("'leased'")
is_unfinished = chunks.c.state.in_([literal_column("'waiting'"), literal_column("'leased'")])

# Not by the id alone, in whose order PostgreSQL would rather walk the primary key past all that is finished.
Index("ix_chunks_waiting", chunks.c.job_id, chunks.c.first_line, sqlite_where=is_waiting, postgresql_where=is_waiting)
Index("ix_chunks_leased", chunks.c.model, chunks.c.leased_until, sqlite_where=is_leased, postgresql_where=is_leased)
Index("ix_chunks_unfinished", chunks.c.job_id, chunks.c.id, sqlite_where=is_unfinished, postgresql_where=is_unfinished)
is_bounded = is_unfinished & chunks.c.due_at.is_not(None)
Index("ix_chunks_due", chunks.c.due_at, sqlite_where=is_bounded, postgresql_where=is_bounded)

# Apart from `chunks`, because SQLite rewrites a whole row, blob and all, for every renewed lease and every counter.
chunk_requests = Table(
    "chunk_requests",
    metadata,
    Column("chunk_id", ForeignKey("chunks.id"), primary_key=True, autoincrement=False),
    Column("requests", LargeBinary, nullable=False),  # protocol.requests.pack_requests
)

# No foreign key on job_id: PostgreSQL would share-lock the Job's one row for every Result of every worker. The fence
# of the Chunk, whose own foreign key holds the Job, already proves that the Job is there.
results = Table(
    "results",
    metadata,
    Column("job_id", String(16), primary_key=True),
    Column("line", BigInteger, primary_key=True, autoincrement=False),  # of the input, from 1
    Column("sample", Integer, primary_key=True, autoincrement=False),  # from 0
    Column("custom_id", FreeText),
    Column("carried", FreeText),  # the caller's user, metadata and store, JSON; NULL when there are none
    Column("endpoint", String(32), nullable=False),  # protocol.requests.Endpoint
    Column("text", FreeText),  # NULL in a failure, as are the next three
    Column("finish_reason", String(16)),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("logprobs", LargeBinary),  # protocol.logprobs.pack_logprobs; NULL when not asked for
    Column("score", LargeBinary),  # protocol.scores.pack_score; NULL when not asked for
    Column("embedding", LargeBinary),  # little-endian float32; NULL for other kinds
    Column("classification", LargeBinary),  # protocol.pooling.pack_classification; NULL for other kinds
    Column("error_code", String(64)),  # NULL in an answer
    Column("error_message", FreeText),
    Column("params", Text),  # ResolvedParams, JSON; NULL when the Request failed before they were known
    Column("is_cached", Boolean, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("attempt", Integer, nullable=False),  # the Chunk's attempt that wrote it; 0: refused at intake
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("line", BigInteger, primary_key=True, autoincrement=False),
    Column("sample", Integer, primary_key=True, autoincrement=False),
    Column("chunk_id", _RowId, nullable=False),  # in whose chunk_requests the Request is
    Column("code", String(64), nullable=False),  # the Result's error_code
    Column("reason", FreeText, nullable=False),  # and its error_message
    Column("created_at", Double, nullable=False),
)

answers = Table(
    "answers",
    metadata,
    Column("key", LargeBinary(32), primary_key=True),  # protocol.requests.answer_key
    Column("text", FreeText, nullable=False),
    Column("finish_reason", String(16), nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("logprobs", LargeBinary),  # as in results
    Column("score", LargeBinary),  # as in results
    Column("embedding", LargeBinary),  # as in results
    Column("classification", LargeBinary),  # as in results
    Column("used_at", Double, nullable=False),  # when it was last found here or made, to within storage.answers.USED_S
)
