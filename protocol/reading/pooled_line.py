"""Lines that ask for an embedding or a classification of their `input`, plain or in a batch line's body."""

from collections.abc import Mapping
from typing import Any

from protocol.errors import InvalidRequest
from protocol.reading.fields import (
    CARRIED_FIELDS,
    IGNORED_FIELDS,
    UNSUPPORTED,
    LineHead,
    check_model,
    quoted,
    read_prompt,
    refuse_field,
)
from protocol.reading.parameters import PARAMETERS, read_params
from protocol.requests import EncodingFormat, Endpoint, Kind, Request
from protocol.sampling import MAX_TOKEN_COUNT

#: Inputs of one line, as at OpenAI: more are better expressed as more lines, which spread over Chunks.
MAX_INPUTS = 2048
KIND_OF_ENDPOINT: dict[Endpoint, Kind] = {"/v1/embeddings": "embed", "/classify": "classify"}
POOLED_KINDS = tuple(KIND_OF_ENDPOINT.values())
#: `kind` may be left out for an embedding.
_PLAIN_FIELDS = frozenset({"id", "custom_id", "kind", *CARRIED_FIELDS})
_EMBED_FIELDS = frozenset({"dimensions", "encoding_format"})
#: The one parameter that means something where nothing is drawn: until when.
_PARAMETER = "timeout"


def read_pooled(fields: Mapping[str, Any], head: LineHead, endpoint: Endpoint = "plain") -> Request:
    """Of a plain line, or of the body of a batch line. Raises InvalidRequest."""
    kind: Kind = KIND_OF_ENDPOINT.get(endpoint) or fields.get("kind") or "embed"
    if kind not in POOLED_KINDS:
        raise InvalidRequest(
            "invalid_parameter", f"kind={quoted(kind)} does not go with input: it is embed or classify"
        )
    own = _PLAIN_FIELDS if endpoint == "plain" else IGNORED_FIELDS
    for name, value in fields.items():
        if name in ("input", "model", _PARAMETER) or name in own or (name in _EMBED_FIELDS and kind == "embed"):
            continue
        if name in PARAMETERS or name in _EMBED_FIELDS:
            if value is not None:
                raise InvalidRequest("unsupported_parameter", f"{name} means nothing for kind {kind}: leave it out")
        elif name not in UNSUPPORTED:
            raise InvalidRequest("unknown_field", f"{quoted(name)} is not a field of kind {kind}, which needs input")
        elif value is not None:
            refuse_field(name)
    check_model(fields.get("model"), head.model_names)
    if fields.get("input") is None:
        raise InvalidRequest("missing_field", f"kind {kind} needs input")
    text, token_ids, inputs = _input(fields["input"])
    return Request(
        line=head.number,
        kind=kind,
        endpoint=endpoint,
        prompt=text,
        prompt_token_ids=token_ids,
        inputs=inputs,
        custom_id=head.custom_id,
        carried=head.carried,
        dimensions=_dimensions(fields.get("dimensions")),
        encoding_format=_encoding_format(fields.get("encoding_format")),
        params=read_params({_PARAMETER: fields.get(_PARAMETER)}),
    )


def _input(
    given: object,
) -> tuple[str | None, tuple[int, ...] | None, tuple[str | tuple[int, ...], ...] | None]:
    """Text, token ids, or several of either."""
    if not isinstance(given, list) or not given or isinstance(given[0], int):
        return *read_prompt(given, "input"), None
    if len(given) > MAX_INPUTS:
        raise InvalidRequest("invalid_parameter", f"input has {len(given)} entries: it may have at most {MAX_INPUTS}")
    inputs: list[str | tuple[int, ...]] = []
    for index, each in enumerate(given):
        text, token_ids = read_prompt(each, f"input[{index}]")
        inputs.append(token_ids or () if text is None else text)
    return None, None, tuple(inputs)


def _dimensions(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_TOKEN_COUNT):
        return value
    raise InvalidRequest(
        "invalid_parameter", f"dimensions={quoted(value)} is out of range: it must be a number from 1 on"
    )


def _encoding_format(value: object) -> EncodingFormat:
    if value in (None, "float"):
        return "float"
    if value == "base64":
        return "base64"
    raise InvalidRequest("invalid_parameter", f"encoding_format={quoted(value)} is unknown: it is float or base64")
