"""OpenAI's batch lines: `custom_id`, `method`, `url`, and a `body` as the endpoint takes it."""

from collections.abc import Mapping
from typing import Any

from protocol.errors import InvalidRequest
from protocol.reading.fields import (
    IGNORED_FIELDS,
    UNSUPPORTED,
    LineHead,
    check_model,
    quoted,
    read_prompt,
    refuse_field,
    type_name,
)
from protocol.reading.messages import read_messages
from protocol.reading.parameters import PARAMETERS, read_params, with_logprobs, with_max_tokens
from protocol.reading.pooled_line import KIND_OF_ENDPOINT, read_pooled
from protocol.requests import Endpoint, Request

_BATCH_FIELDS = frozenset({"custom_id", "method", "url", "body"})
_CONTENT_FIELD: dict[Endpoint, str] = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/embeddings": "input",
    "/classify": "input",
}


def read_envelope(fields: Mapping[str, Any]) -> Endpoint:
    """The endpoint the line is for. Raises InvalidRequest."""
    for name in fields:
        if name not in _BATCH_FIELDS:
            raise InvalidRequest("unknown_field", f"{quoted(name)} is not a field of a batch line")
    url, method = fields.get("url"), fields.get("method", "POST")
    if url is None:
        raise InvalidRequest("missing_field", f"a batch line needs url: one of {', '.join(_CONTENT_FIELD)}")
    if method != "POST":
        raise InvalidRequest("unsupported_url", f"method {quoted(method)} is not supported: it must be POST")
    for endpoint in _CONTENT_FIELD:
        if url == endpoint:
            return endpoint
    raise InvalidRequest(
        "unsupported_url", f"url {quoted(url)} is not supported: use one of {', '.join(_CONTENT_FIELD)}"
    )


def read_body(body: object, head: LineHead, endpoint: Endpoint) -> Request:
    """Raises InvalidRequest."""
    if body is None:
        raise InvalidRequest("missing_field", "a batch line needs body")
    if not isinstance(body, dict):
        raise InvalidRequest("invalid_type", f"body must be an object, not {type_name(body)}")
    if endpoint in KIND_OF_ENDPOINT:
        return read_pooled(body, head, endpoint)
    content_field = _CONTENT_FIELD[endpoint]
    for name, value in body.items():
        _check_body_field(name, value, content_field)
    check_model(body.get("model"), head.model_names)
    content = body.get(content_field)
    if content is None:
        raise InvalidRequest("missing_field", f"the body of a line for {endpoint} needs {content_field}")
    text, token_ids = read_prompt(content) if content_field == "prompt" else (None, None)
    return Request(
        line=head.number,
        endpoint=endpoint,
        prompt=text,
        prompt_token_ids=token_ids,
        messages=read_messages(content) if content_field == "messages" else None,
        custom_id=head.custom_id,
        carried=head.carried,
        params=read_params(with_logprobs(with_max_tokens(body), endpoint)),
    )


def _check_body_field(name: str, value: object, content_field: str) -> None:
    if name in (content_field, "model", "max_completion_tokens", "top_logprobs"):
        return
    if name in PARAMETERS or name in IGNORED_FIELDS:
        return
    if name in UNSUPPORTED:
        if value is None or any(_is_same(value, neutral) for neutral in UNSUPPORTED[name]):
            return
        raise InvalidRequest("unsupported_parameter", f"{name} is not supported: leave it out")
    refuse_field(name)


def _is_same(value: object, neutral: object) -> bool:
    # To Python 0 equals False, but logprobs=0 asks for something and logprobs=false does not.
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
