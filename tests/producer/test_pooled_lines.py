"""Lines that ask for an embedding or a classification."""

import json
from typing import Any

import pytest

from producer.lines import read_line
from protocol.requests import Request, Result


def read(**fields: Any) -> Request:
    item = read_line(json.dumps(fields).encode(), 1, ("tiny",))
    assert isinstance(item, Request), item
    return item


def refusal(**fields: Any) -> tuple[str, str]:
    item = read_line(json.dumps(fields).encode(), 1, ("tiny",))
    assert isinstance(item, Result)
    assert item.failure is not None
    return item.failure.code, item.failure.message


def test_plain_input_asks_for_an_embedding() -> None:
    assert read(input="a text", id=7) == Request(line=1, kind="embed", prompt="a text", custom_id="7")
    assert read(input=[5, 6], kind="embed").prompt_token_ids == (5, 6)


def test_plain_input_of_kind_classify_asks_for_a_classification() -> None:
    assert read(input="a text", kind="classify") == Request(line=1, kind="classify", prompt="a text")


def test_batch_lines_for_embeddings_are_read() -> None:
    body = {"model": "tiny", "input": "a text", "encoding_format": "base64", "dimensions": 16, "user": "me"}
    request = read(custom_id="a", method="POST", url="/v1/embeddings", body=body)

    assert (request.kind, request.endpoint, request.prompt) == ("embed", "/v1/embeddings", "a text")
    assert (request.custom_id, request.encoding_format, request.dimensions) == ("a", "base64", 16)


def test_batch_lines_for_classifications_are_read() -> None:
    request = read(custom_id="a", url="/classify", body={"model": "tiny", "input": ["a text", [5, 6]]})

    assert (request.kind, request.endpoint) == ("classify", "/classify")
    assert (request.prompt, request.inputs) == (None, ("a text", (5, 6)))


@pytest.mark.parametrize(
    ("fields", "code", "part"),
    [
        ({"kind": "embed"}, "missing_field", "kind embed needs input"),
        ({"url": "/v1/embeddings", "body": {}}, "missing_field", "kind embed needs input"),
        ({"input": "a", "kind": "generate"}, "invalid_parameter", "kind='generate' does not go with input"),
        ({"input": "a", "prompt": "b"}, "unknown_field", "'prompt' is not a field of kind embed"),
        ({"input": "a", "temperature": 0}, "unsupported_parameter", "temperature means nothing for kind embed"),
        (
            {"input": "a", "kind": "classify", "dimensions": 5},
            "unsupported_parameter",
            "dimensions means nothing for kind classify",
        ),
        ({"input": "a", "dimensions": 0}, "invalid_parameter", "dimensions=0 is out of range"),
        ({"input": "a", "dimensions": "5"}, "invalid_parameter", "dimensions='5' is out of range"),
        ({"input": "a", "encoding_format": "int8"}, "invalid_parameter", "encoding_format='int8' is unknown"),
        ({"input": 5}, "invalid_type", "input must be a string or token ids, not a number"),
        ({"input": []}, "empty_prompt", "input has no token ids"),
        ({"input": ["a", 5]}, "invalid_type", "input[1] must be a string or token ids, not a number"),
        ({"input": [[5], ["a"]]}, "invalid_type", "input[1] must be one text"),
        ({"input": ["a"] * 2049}, "invalid_parameter", "input has 2049 entries: it may have at most 2048"),
        ({"input": "a", "model": "other"}, "unknown_model", "asks for model 'other'"),
        ({"prompt": "a", "dimensions": 5}, "unknown_field", "'dimensions' is not a known field"),
    ],
)
def test_a_line_that_cannot_be_used_says_what_is_wrong(fields: dict[str, Any], code: str, part: str) -> None:
    refused_code, message = refusal(**fields)

    assert refused_code == code
    assert part in message
