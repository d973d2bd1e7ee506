"""Lines that ask for a score: `context` and `continuation`, or kind score with all of a `text`."""

from collections.abc import Mapping
from typing import Any

from protocol.errors import InvalidRequest
from protocol.reading.fields import CARRIED_FIELDS, LineHead, check_model, quoted, read_text
from protocol.reading.parameters import PARAMETERS, read_params
from protocol.requests import Request

#: `kind` may be left out beside a continuation.
_FIELDS = frozenset({"id", "custom_id", "model", "kind", "context", "continuation", "text", *CARRIED_FIELDS})
#: What means something for a score: how many alternatives are told with each token, and until when.
_PARAMETERS = frozenset({"prompt_logprobs", "timeout"})


def read_score(fields: Mapping[str, Any], head: LineHead) -> Request:
    """Raises InvalidRequest."""
    for name, value in fields.items():
        if name in PARAMETERS - _PARAMETERS:
            if value is not None:
                raise InvalidRequest("unsupported_parameter", f"{name} means nothing for a score: leave it out")
        elif name not in _FIELDS and name not in _PARAMETERS:
            raise InvalidRequest(
                "unknown_field",
                f"{quoted(name)} is not a field of a score, which needs text, or context and continuation",
            )
    if fields.get("kind") not in (None, "score"):
        raise InvalidRequest("invalid_parameter", "a continuation is for a score: leave kind out")
    check_model(fields.get("model"), head.model_names)
    text, context, continuation = (read_text(fields, name) for name in ("text", "context", "continuation"))
    if (text is None) == (continuation is None) or (text is not None and context is not None):
        raise InvalidRequest("missing_field", "a score needs text, or context and continuation")
    if continuation == "":
        raise InvalidRequest("empty_continuation", "continuation is empty: there is nothing to score")
    return Request(
        line=head.number,
        kind="score",
        prompt=text,
        context=None if continuation is None else context or "",
        continuation=continuation,
        custom_id=head.custom_id,
        carried=head.carried,
        params=read_params({name: fields.get(name) for name in _PARAMETERS}),
    )
