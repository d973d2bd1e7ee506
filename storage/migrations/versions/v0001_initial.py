"""Jobs, Chunks, Results and answers."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ROW_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    _create_jobs()
    _create_chunks()
    _create_results()
    op.create_table(
        "dead_letters",
        sa.Column("job_id", sa.String(16), nullable=False),
        sa.Column("line", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("sample", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("chunk_id", _ROW_ID, nullable=False),
        sa.Column("code", sa.String(64), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "line", "sample", name="pk_dead_letters"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_dead_letters_job_id", ondelete="CASCADE"),
    )
    op.create_table(
        "answers",
        sa.Column("key", sa.LargeBinary(32), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("finish_reason", sa.String(16), nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("logprobs", sa.LargeBinary),
        sa.Column("score", sa.LargeBinary),
        sa.Column("embedding", sa.LargeBinary),
        sa.Column("classification", sa.LargeBinary),
        sa.Column("used_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_answers"),
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("identity", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("params", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("is_asked", sa.Boolean, nullable=False),
        sa.Column("num_lines", sa.BigInteger),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double),
        sa.Column("num_results", sa.BigInteger),
        sa.Column("num_errors", sa.BigInteger),
        sa.Column("num_cached", sa.BigInteger),
        sa.Column("digest", sa.String(64)),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.CheckConstraint(
            "state IN ('submitting', 'running', 'finished', 'cancelled', 'deleting')", name=op.f("ck_jobs_state")
        ),
    )
    is_submitted = {"sqlite": sa.text("is_asked = 0"), "postgresql": sa.text("NOT is_asked")}
    op.create_index(
        "ix_jobs_tenant_created_at",
        "jobs",
        ["tenant", "created_at"],
        sqlite_where=is_submitted["sqlite"],
        postgresql_where=is_submitted["postgresql"],
    )
    is_open = sa.text("state IN ('submitting', 'running')")
    op.create_index(
        "ix_jobs_open",
        "jobs",
        ["model", "priority", "created_at"],
        sqlite_where=is_open,
        postgresql_where=is_open,
    )
    is_there = sa.text("state != 'deleting'")
    op.create_index(
        "uq_jobs_tenant_identity",
        "jobs",
        ["tenant", "identity"],
        unique=True,
        sqlite_where=is_there,
        postgresql_where=is_there,
    )


def _create_chunks() -> None:
    op.create_table(
        "chunks",
        sa.Column("id", _ROW_ID, nullable=False),
        sa.Column("job_id", sa.String(16), nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("first_line", sa.BigInteger, nullable=False),
        sa.Column("last_line", sa.BigInteger, nullable=False),
        sa.Column("num_requests", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("leased_until", sa.Double),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("due_at", sa.Double),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("num_ok", sa.Integer, nullable=False),
        sa.Column("num_error", sa.Integer, nullable=False),
        sa.Column("num_cached", sa.Integer, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("computed_tokens", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_chunks"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_chunks_job_id"),
        sa.UniqueConstraint("job_id", "first_line", name="uq_chunks_job_id_first_line"),
        sa.CheckConstraint("state IN ('waiting', 'leased', 'finished', 'cancelled')", name=op.f("ck_chunks_state")),
        sqlite_autoincrement=True,
    )
    _create_partial_index("ix_chunks_waiting", ["job_id", "first_line"], "state = 'waiting'")
    _create_partial_index("ix_chunks_leased", ["model", "leased_until"], "state = 'leased'")
    _create_partial_index("ix_chunks_unfinished", ["job_id", "id"], "state IN ('waiting', 'leased')")
    _create_partial_index("ix_chunks_due", ["due_at"], "state IN ('waiting', 'leased') AND due_at IS NOT NULL")
    op.create_table(
        "chunk_requests",
        sa.Column("chunk_id", _ROW_ID, nullable=False, autoincrement=False),
        sa.Column("requests", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("chunk_id", name="pk_chunk_requests"),
        sa.ForeignKeyConstraint(["chunk_id"], ["chunks.id"], name="fk_chunk_requests_chunk_id"),
    )


def _create_partial_index(name: str, columns: list[str], condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, "chunks", columns, sqlite_where=where, postgresql_where=where)


def _create_results() -> None:
    op.create_table(
        "results",
        sa.Column("job_id", sa.String(16), nullable=False),
        sa.Column("line", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("sample", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("custom_id", sa.Text),
        sa.Column("carried", sa.Text),
        sa.Column("endpoint", sa.String(32), nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("finish_reason", sa.String(16)),
        sa.Column("prompt_tokens", sa.Integer),
        sa.Column("completion_tokens", sa.Integer),
        sa.Column("logprobs", sa.LargeBinary),
        sa.Column("score", sa.LargeBinary),
        sa.Column("embedding", sa.LargeBinary),
        sa.Column("classification", sa.LargeBinary),
        sa.Column("error_code", sa.String(64)),
        sa.Column("error_message", sa.Text),
        sa.Column("params", sa.Text),
        sa.Column("is_cached", sa.Boolean, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "line", "sample", name="pk_results"),
    )
