"""How commands show Jobs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.jobs import Job, JobStatus


def as_json_object(status: "JobStatus") -> dict[str, Any]:
    """The Job's fields and its counters by their names."""
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(status)
    job: dict[str, Any] = fields.pop("job")
    return job | fields


def shown_name(job: "Job") -> str:
    """What the Job was named; nothing for one that is known by its content."""
    # A digest says nothing to a reader.
    is_digest = len(job.identity) == 64 and set(job.identity) <= set("0123456789abcdef")
    return "" if is_digest else job.identity
