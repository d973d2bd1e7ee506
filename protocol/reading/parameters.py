"""Sampling parameters of a line: OpenAI's and vLLM's spellings as SamplingParams."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from protocol.errors import InvalidRequest
from protocol.reading.fields import type_name
from protocol.requests import Endpoint
from protocol.sampling import MAX_LOGPROBS, SamplingParams

PARAMETERS = frozenset(SamplingParams.__struct_fields__)

_UNSET = SamplingParams()
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


def read_params(fields: Mapping[str, Any]) -> SamplingParams:
    """From the fields that are parameters; the others are passed over. Raises InvalidRequest."""
    given = {name: value for name, value in fields.items() if value is not None and name in PARAMETERS}
    if not given:
        return _UNSET
    try:
        key = _encode(given)
    except OverflowError:  # a number beyond 64 bits
        return _read(given)
    return _read_known(key)


@lru_cache(maxsize=1024)
def _read_known(key: bytes) -> SamplingParams:
    """Most lines of an input say the same."""
    return _read(_decode(key))


def _read(given: dict[str, Any]) -> SamplingParams:
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    try:
        params = msgspec.convert(given, SamplingParams, str_keys=True)  # logit_bias has token ids for keys
    except msgspec.ValidationError as error:
        raise InvalidRequest("invalid_type", f"a parameter has the wrong type: {error}") from error
    params.validate()
    return params


def with_max_tokens(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The body with OpenAI's newer name for max_tokens under the older one."""
    newer, older = body.get("max_completion_tokens"), body.get("max_tokens")
    if newer is None:
        return body
    if older is not None and older != newer:
        raise InvalidRequest("invalid_parameter", "max_tokens and max_completion_tokens differ: give one of them")
    return {**body, "max_tokens": newer}


def with_logprobs(fields: Mapping[str, Any], endpoint: Endpoint) -> Mapping[str, Any]:
    """The fields with both of OpenAI's forms as the number of alternatives: a number for completions, for chat a
    boolean with the number in top_logprobs. Plain lines may use either."""
    logprobs, num_top = fields.get("logprobs"), fields.get("top_logprobs")
    if isinstance(logprobs, bool) or logprobs is None:
        if logprobs and endpoint == "/v1/completions":
            raise InvalidRequest("invalid_type", "logprobs must be a number here: how many alternatives per token")
        if not logprobs and num_top not in (None, 0):
            raise InvalidRequest("invalid_parameter", "top_logprobs needs logprobs: true beside it")
        if logprobs and num_top is not None:
            _check_top_logprobs(num_top)
        return {**fields, "logprobs": (num_top or 0) if logprobs else None}
    if endpoint == "/v1/chat/completions":
        raise InvalidRequest("invalid_type", "logprobs must be a boolean here: the number goes into top_logprobs")
    if num_top is not None:
        raise InvalidRequest("invalid_parameter", "logprobs and top_logprobs both give a number: leave one out")
    return fields


def _check_top_logprobs(value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest("invalid_type", f"top_logprobs must be a number, not {type_name(value)}")
    if not 0 <= value <= MAX_LOGPROBS:
        raise InvalidRequest(
            "invalid_parameter", f"top_logprobs={value} is out of range: it must be between 0 and {MAX_LOGPROBS}"
        )
