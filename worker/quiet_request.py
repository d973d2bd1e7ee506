"""QuietRequest: Celery's view of a message, showing counts wherever Celery would show what the caller wrote.

Callers send a representation of their arguments along, which goes into events, logs and `inspect`: it is replaced
before any of those sees it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from celery.exceptions import InvalidTaskError
from celery.worker.request import Request

from protocol.reading.parameters import PARAMETERS

#: Keywords whose names may be shown; any other may be a caller's own words.
_NAMES = PARAMETERS | {
    "prompt", "messages", "context", "continuation", "text", "input", "model", "kind", "dimensions", "encoding_format",
    "max_completion_tokens", "top_logprobs",
}  # fmt: skip


class QuietRequest(Request):  # type: ignore[misc]  # celery has no types
    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        parts = ((self._args, list | tuple), (self._kwargs, dict), (self._payload[2], dict | None))
        if not all(isinstance(part, kind) for part, kind in parts):
            # The tracer would find out too late to tell the caller.
            raise InvalidTaskError("a task has a list of arguments and a mapping of keyword arguments")
        self._argsrepr, self._kwargsrepr = shown_args(self._args), shown_kwargs(self._kwargs)
        # The tracer takes them from here.
        self._request_dict.update(argsrepr=self._argsrepr, kwargsrepr=self._kwargsrepr)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """For `inspect`: never the arguments themselves."""
        info: dict[str, Any] = super().info(safe=True)
        return info


def shown_args(args: Sequence[Any]) -> str:
    inside = ", ".join(map(_shown, args))
    return f"({inside},)" if len(args) == 1 else f"({inside})"


def shown_kwargs(kwargs: Mapping[str, Any]) -> str:
    pairs = ((name if name in _NAMES else "<unknown>", value) for name, value in kwargs.items())
    return "{" + ", ".join(f"{name}: {_shown(value)}" for name, value in pairs) + "}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str | bytes):
        return f"<{len(value)} characters>"
    if isinstance(value, list | tuple | dict):
        return f"<{len(value)} entries>"
    return f"<{type(value).__name__}>"
