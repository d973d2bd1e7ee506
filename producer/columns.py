"""Columns: which of a table's columns are taken, and what for. Others are left, also those named like a parameter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from protocol.errors import ConfigurationError
from protocol.requests import Kind

#: Columns that a message names.
_MAX_NAMED = 30


@dataclass(frozen=True, slots=True)
class Columns:
    """Of a CSV or Parquet file, whose rows all ask for one `kind`; without `id` they have no custom_id."""

    prompt: str = "prompt"
    id: str | None = None
    kind: Kind = "generate"

    def find(self, names: Sequence[str]) -> tuple[int, int | None]:
        """Where the two are among these. Raises ConfigurationError naming those there are, also for one there twice."""
        return self._index("prompt", self.prompt, names), None if self.id is None else self._index("id", self.id, names)

    def line(self, text: str | None) -> dict[str, Any]:
        """A row's text as the object that a line of a JSONL file would hold."""
        if self.kind == "generate":
            return {"prompt": text}
        return {"kind": self.kind, "text" if self.kind == "score" else "input": text}

    def _index(self, what: str, name: str, names: Sequence[str]) -> int:
        found = names.count(name)
        if found == 1:
            return names.index(name)
        trouble = f"{found} columns are named {name!r}" if found else f"there is no column {name!r}"
        there = ", ".join(repr(each) for each in names[:_MAX_NAMED]) + ", ..." * (len(names) > _MAX_NAMED)
        raise ConfigurationError(f"{trouble} for the {what}: --{what}-column takes one of {there}")


ALL_DEFAULTS = Columns()
