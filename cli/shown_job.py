"""How commands show Jobs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.jobs import JobStatus


def as_json_object(status: "JobStatus") -> dict[str, Any]:
    """The Job's fields and its counters by their names."""
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(status)
    job: dict[str, Any] = fields.pop("job")
    return job | fields
