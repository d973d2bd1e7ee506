"""Plain lines that ask for text: `prompt` or `messages`, and sampling parameters beside them."""

from collections.abc import Mapping
from typing import Any, get_args

from protocol.errors import InvalidRequest
from protocol.reading.fields import CARRIED_FIELDS, LineHead, check_model, quoted, read_prompt, refuse_field
from protocol.reading.messages import read_messages
from protocol.reading.parameters import PARAMETERS, read_params, with_logprobs, with_max_tokens
from protocol.requests import Kind, Request

_FIELDS = frozenset({"id", "custom_id", "model", "prompt", "messages", "kind", *CARRIED_FIELDS})
#: Other spellings of parameters.
_SPELLINGS = frozenset({"max_completion_tokens", "top_logprobs"})


def read_plain(fields: Mapping[str, Any], head: LineHead) -> Request:
    """Raises InvalidRequest."""
    for name in fields:
        if name not in _FIELDS and name not in PARAMETERS and name not in _SPELLINGS:
            refuse_field(name)
    if fields.get("kind") not in (None, "generate"):
        raise InvalidRequest(
            "invalid_parameter", f"kind={quoted(fields['kind'])} is unknown: it is one of {', '.join(get_args(Kind))}"
        )
    check_model(fields.get("model"), head.model_names)
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if prompt is None and messages is None:
        raise InvalidRequest("missing_field", "prompt or messages is missing: give one of them")
    if prompt is not None and messages is not None:
        raise InvalidRequest("invalid_parameter", "prompt and messages exclude each other: give one of them")
    text, token_ids = (None, None) if prompt is None else read_prompt(prompt)
    return Request(
        line=head.number,
        endpoint="plain" if messages is None else "/v1/chat/completions",
        prompt=text,
        prompt_token_ids=token_ids,
        messages=None if messages is None else read_messages(messages),
        custom_id=head.custom_id,
        carried=head.carried,
        params=read_params(with_logprobs(with_max_tokens(fields), "plain")),
    )
