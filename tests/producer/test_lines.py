import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer import raw_lines
from producer.lines import LineReader, encode_item, read_line
from producer.raw_lines import RawLine, split_lines
from protocol.requests import Message, Request, Result
from protocol.sampling import SamplingParams

MODELS = ("tiny",)


def read(*raw: RawLine, skip: int = 0) -> list[Request | Result]:
    return list(LineReader(raw, MODELS, skip=skip))


def batch_line(url: str = "/v1/chat/completions", **body: Any) -> bytes:
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()


def refusal(raw: bytes) -> tuple[str, str]:
    result = read_line(raw, 7, MODELS)
    assert isinstance(result, Result)
    assert result.failure is not None
    assert result.line == 7
    assert result.answer is None
    return result.failure.code, result.failure.message


def test_plain_prompt_is_read_with_its_parameters() -> None:
    raw = b'{"id": "x", "prompt": "Hi", "max_tokens": 5, "temperature": 1, "top_k": -1, "stop": "."}'

    assert read(raw) == [
        Request(
            line=1,
            prompt="Hi",
            custom_id="x",
            params=SamplingParams(max_tokens=5, temperature=1.0, top_k=-1, stop=(".",)),
        )
    ]


def test_plain_messages_are_read() -> None:
    assert read(b'{"custom_id": "x", "messages": [{"role": "user", "content": "Hi"}]}') == [
        Request(line=1, endpoint="/v1/chat/completions", messages=(Message("user", "Hi"),), custom_id="x")
    ]


def test_number_as_id_is_kept_as_text() -> None:
    assert read(b'{"id": 17, "prompt": "Hi"}') == [Request(line=1, prompt="Hi", custom_id="17")]


def test_chat_batch_line_is_read() -> None:
    raw = batch_line(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi", "name": None}],
        max_completion_tokens=9,
        seed=3,
        stop=["a", "b"],
        user="somebody",
        metadata={"k": "v"},
        store=False,
    )

    assert read(raw) == [
        Request(
            line=1,
            endpoint="/v1/chat/completions",
            messages=(Message("system", "Be brief"), Message("user", "Hi")),
            custom_id="a",
            params=SamplingParams(max_tokens=9, seed=3, stop=("a", "b")),
            carried='{"user":"somebody","metadata":{"k":"v"},"store":false}',
        )
    ]


def test_completions_batch_line_is_read() -> None:
    assert read(batch_line("/v1/completions", prompt="Hi", n=2, ignore_eos=True)) == [
        Request(
            line=1,
            endpoint="/v1/completions",
            prompt="Hi",
            custom_id="a",
            params=SamplingParams(n=2, ignore_eos=True),
        )
    ]


def test_token_ids_are_read_as_a_prompt() -> None:
    plain, completion = read(b'{"prompt": [5, 0, 5]}', batch_line("/v1/completions", prompt=[7]))

    assert plain == Request(line=1, prompt_token_ids=(5, 0, 5))
    assert isinstance(completion, Request)
    assert (completion.prompt, completion.prompt_token_ids) == (None, (7,))


def test_every_parameter_is_read_from_any_kind_of_line() -> None:
    given: dict[str, Any] = {
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "logit_bias": {"17": -100, "0": 2.5},
        "min_tokens": 3,
        "stop_token_ids": [9, 8],
        "prompt_logprobs": 1,
    }
    expected = SamplingParams(
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={17: -100, 0: 2.5},
        min_tokens=3,
        stop_token_ids=(9, 8),
        prompt_logprobs=1,
    )
    items = read(
        json.dumps({"prompt": "a", **given}).encode(),
        batch_line("/v1/completions", prompt="a", **given),
        batch_line(messages=[{"role": "user", "content": "a"}], **given),
        encode_item({"prompt": "a", **given, "logit_bias": {17: -100, 0: 2.5}}),
    )

    assert [item.params for item in items if isinstance(item, Request)] == [expected] * 4


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 4}, 4),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
    ],
)
def test_chat_form_of_logprobs_is_read(fields: dict[str, Any], logprobs: int | None) -> None:
    items = read(
        batch_line(messages=[{"role": "user", "content": "a"}], **fields), encode_item({"prompt": "a", **fields})
    )

    assert [item.params for item in items if isinstance(item, Request)] == [SamplingParams(logprobs=logprobs)] * 2


def test_each_endpoint_has_its_own_form_of_logprobs() -> None:
    (completion,) = read(batch_line("/v1/completions", prompt="a", logprobs=5))
    assert isinstance(completion, Request)
    assert completion.params.logprobs == 5
    assert refusal(batch_line("/v1/completions", prompt="a", logprobs=True))[0] == "invalid_type"
    code, message = refusal(batch_line(messages=[{"role": "user", "content": "a"}], logprobs=5))
    assert code == "invalid_type"
    assert "top_logprobs" in message


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]

    assert read(batch_line(messages=[{"role": "user", "content": parts}]))[0] == Request(
        line=1, endpoint="/v1/chat/completions", messages=(Message("user", "Hello"),), custom_id="a"
    )


def test_unsupported_parameters_that_ask_for_nothing_may_stay() -> None:
    raw = batch_line(
        messages=[{"role": "user", "content": "Hi"}],
        stream=False,
        logprobs=None,
        tools=[],
        presence_penalty=0,
        frequency_penalty=0.0,
        response_format={"type": "text"},
        top_p=None,
    )

    assert isinstance(read(raw)[0], Request)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("stream", True),
        ("best_of", 3),
        ("echo", True),
    ],
)
def test_unsupported_parameter_is_refused_by_name(name: str, value: object) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], name: value}

    code, message = refusal(batch_line(**body))

    assert code == "unsupported_parameter"
    assert message == f"{name} is not supported: leave it out"


@pytest.mark.parametrize(
    ("raw", "code", "part"),
    [
        (b"{", "invalid_json", "cannot be read as JSON"),
        (b'{"prompt": "Hi"} {}', "invalid_json", "trailing characters"),
        (b'{"prompt": NaN}', "invalid_json", "invalid character"),
        (b'{"prompt": "\xff"}', "invalid_utf8", "not valid UTF-8"),
        ("\ufeff{}".encode("utf-16-le"), "invalid_utf8", "save the file as UTF-8"),
        (b'{"prompt": "\\udc00"}', "invalid_utf8", "half of a surrogate pair"),
        (b'{"prompt": "\\uD800"}', "invalid_utf8", "half of a surrogate pair"),
        (encode_item("a\ud800"), "invalid_utf8", "half of a surrogate pair"),
        (b'{"prompt": "\\ud800', "invalid_json", "cannot be read as JSON"),
        (b'{"a":' * 100_000, "invalid_json", "nested too deeply"),
        (b'"Hi"', "invalid_type", "not a JSON object but a string"),
        (b"[]", "invalid_type", "not a JSON object but a list"),
        (b"{}", "missing_field", "prompt or messages is missing"),
        (b'{"prompt": "a", "messages": []}', "invalid_parameter", "exclude each other"),
        (b'{"prompt": 5}', "invalid_type", "prompt must be a string or token ids, not a number"),
        (b'{"prompt": ["a"]}', "invalid_type", "a line of its own"),
        (b'{"prompt": "a", "max_token": 5}', "unknown_field", "'max_token' is not a known field"),
        (b'{"prompt": "a", "stream": false}', "unsupported_parameter", "stream is not supported"),
        (b'{"prompt": "a", "max_tokens": 0}', "invalid_parameter", "max_tokens=0 is out of range"),
        (b'{"prompt": "a", "max_tokens": 4294967296}', "invalid_parameter", "between 1 and 2147483647"),
        (b'{"prompt": "a", "top_k": 1e3}', "invalid_type", "Expected `int | null`, got `float` - at `$.top_k`"),
        (b'{"prompt": "a", "temperature": true}', "invalid_type", "got `bool` - at `$.temperature`"),
        (b'{"prompt": "a", "temperature": 2.5}', "invalid_parameter", "between 0 and 2"),
        (b'{"prompt": "a", "seed": 99999999999999999999}', "invalid_parameter", "a signed 64-bit integer"),
        (b'{"prompt": "a", "n": 1000}', "invalid_parameter", "between 1 and 128"),
        (
            b'{"prompt": "a", "stop": ["b", ""]}',
            "invalid_parameter",
            "stop='' is out of range: it must be a text that is",
        ),
        (
            b'{"prompt": "a", "stop": [%s]}' % b",".join([b'"b"'] * 17),
            "invalid_parameter",
            "len(stop)=17 is out of range",
        ),
        (
            b'{"prompt": "a", "min_p": 1.5}',
            "invalid_parameter",
            "min_p=1.5 is out of range: it must be between 0 and 1",
        ),
        (b'{"prompt": "a", "repetition_penalty": 0}', "invalid_parameter", "repetition_penalty=0.0 is out of range"),
        (b'{"prompt": "a", "presence_penalty": 3}', "invalid_parameter", "presence_penalty=3.0 is out of range"),
        (b'{"prompt": "a", "frequency_penalty": -3}', "invalid_parameter", "frequency_penalty=-3.0 is out of range"),
        (b'{"prompt": "a", "logit_bias": {"5": 101}}', "invalid_parameter", "logit_bias[5]=101.0 is out of range"),
        (b'{"prompt": "a", "logit_bias": {"-5": 1}}', "invalid_parameter", "logit_bias[-5]=1.0 is out of range"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "invalid_type", "logit_bias"),
        (b'{"prompt": "a", "min_tokens": 5, "max_tokens": 4}', "invalid_parameter", "at most max_tokens=4"),
        (b'{"prompt": "a", "stop_token_ids": [-1]}', "invalid_parameter", "stop_token_ids=-1 is out of range"),
        (b'{"prompt": "a", "logprobs": 21}', "invalid_parameter", "logprobs=21 is out of range"),
        (b'{"prompt": "a", "prompt_logprobs": 21}', "invalid_parameter", "prompt_logprobs=21 is out of range"),
        (b'{"prompt": "a", "top_logprobs": 3}', "invalid_parameter", "top_logprobs needs logprobs: true"),
        (b'{"prompt": "a", "logprobs": true, "top_logprobs": 21}', "invalid_parameter", "top_logprobs=21"),
        (b'{"prompt": "a", "logprobs": 2, "top_logprobs": 2}', "invalid_parameter", "leave one out"),
        (b'{"prompt": []}', "empty_prompt", "prompt has no token ids"),
        (b'{"prompt": [1, true]}', "invalid_type", "prompt[1] must be a token id, not a boolean"),
        (b'{"prompt": [1, "a"]}', "invalid_type", "prompt[1] must be a token id, not a string"),
        (b'{"prompt": [[1]]}', "invalid_type", "a line of its own"),
        (b'{"prompt": [1, -2]}', "invalid_token", "prompt[1]=-2 is no token id"),
        (b'{"prompt": [4294967296]}', "invalid_token", "prompt[0]=4294967296 is no token id"),
        (b'{"prompt": "a", "id": 1.5}', "invalid_type", "custom_id must be a string, not a number"),
        (b'{"prompt": "a", "id": "1", "custom_id": "1"}', "invalid_parameter", "the same thing"),
        (b'{"prompt": "a", "id": "' + b"x" * 513 + b'"}', "invalid_parameter", "it may have at most 512 characters"),
        (b'{"prompt": "a", "model": "gpt-9"}', "unknown_model", "asks for model 'gpt-9', but this Job's is 'tiny'"),
        (b'{"prompt": "a", "model": []}', "invalid_type", "model must be a string, not a list"),
        (b'{"prompt": "a", "store": 1}', "invalid_type", "store must be a boolean, not a number"),
        (b'{"prompt": "a", "metadata": "b"}', "invalid_type", "metadata must be an object, not a string"),
        (b'{"prompt": "a", "user": "' + b"x" * 70_000 + b'"}', "invalid_parameter", "they may have at most 65536"),
        (b'{"messages": {}}', "invalid_type", "messages must be a list, not an object"),
        (b'{"messages": []}', "invalid_parameter", "messages is empty"),
        (b'{"messages": ["Hi"]}', "invalid_type", "messages[0] must be an object, not a string"),
        (b'{"messages": [{"role": "user"}]}', "missing_field", "messages[0] needs content"),
        (b'{"messages": [{"role": 1, "content": ""}]}', "invalid_type", "messages[0].role must be a string"),
        (b'{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}', "unsupported_parameter", "tool_calls"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "unsupported_parameter",
            "messages[0].content[0] has type 'image_url': only text is supported",
        ),
        (b'{"url": "/v1/moderations", "body": {}}', "unsupported_url", "url '/v1/moderations' is not supported"),
        (b'{"url": "/v1/completions", "method": "GET", "body": {}}', "unsupported_url", "it must be POST"),
        (b'{"url": "/v1/completions"}', "missing_field", "needs body"),
        (b'{"url": "/v1/completions", "body": 5}', "invalid_type", "body must be an object, not a number"),
        (b'{"body": {}}', "missing_field", "a batch line needs url"),
        (b'{"url": "/v1/completions", "body": {}, "x": 1}', "unknown_field", "'x' is not a field of a batch line"),
        (b'{"url": "/v1/completions", "body": {}}', "missing_field", "/v1/completions needs prompt"),
        (
            b'{"url": "/v1/completions", "body": {"messages": []}}',
            "unknown_field",
            "'messages' is not a known field",
        ),
    ],
)
def test_malformed_line_is_refused_with_a_code_and_a_reason(raw: bytes, code: str, part: str) -> None:
    refused_code, message = refusal(raw)

    assert refused_code == code
    assert part in message


def test_differing_names_for_max_tokens_are_refused_and_equal_ones_accepted() -> None:
    messages = [{"role": "user", "content": "Hi"}]

    assert refusal(batch_line(messages=messages, max_tokens=5, max_completion_tokens=6))[0] == "invalid_parameter"
    assert isinstance(read(batch_line(messages=messages, max_tokens=5, max_completion_tokens=5))[0], Request)
    (plain,) = read(b'{"prompt": "Hi", "max_completion_tokens": 7}')
    assert isinstance(plain, Request)
    assert plain.params.max_tokens == 7


def test_refused_line_keeps_its_custom_id_and_endpoint() -> None:
    (result,) = read(batch_line("/v1/completions", prompt="Hi", tools=[1]))

    assert isinstance(result, Result)
    assert result.custom_id == "a"
    assert result.endpoint == "/v1/completions"


def test_what_the_caller_says_for_himself_is_carried_by_every_kind_of_line() -> None:
    given = {"metadata": {"k": ["é", 2**70]}, "user": None}
    content: list[dict[str, Any]] = [{"prompt": "a"}, {"continuation": "a"}, {"input": "a"}]
    lines = [json.dumps({**fields, **given}).encode() for fields in content]
    lines += [batch_line("/v1/embeddings", input="a", **given), batch_line("/v1/completions", prompt=5, **given)]

    items = read(*lines)

    assert [type(item) for item in items] == [Request] * 4 + [Result]
    assert {item.carried for item in items} == {
        json.dumps({"metadata": given["metadata"]}, ensure_ascii=False, separators=(",", ":"))
    }


def test_malformed_line_does_not_stop_the_ones_after_it() -> None:
    items = read(b'{"prompt": "a"}\n', b"nonsense\n", b'{"prompt": "c"}\n')

    assert [(item.line, type(item)) for item in items] == [(1, Request), (2, Result), (3, Request)]


def test_blank_lines_count_and_yield_nothing() -> None:
    reader = LineReader([b'{"prompt": "a"}\n', b"\n", b"  \r\n", b'{"prompt": "d"}\n', b"\n"], MODELS)

    assert [item.line for item in reader] == [1, 4]
    assert reader.num_lines == 5


def test_byte_order_mark_and_windows_line_ends_are_tolerated() -> None:
    assert read(b'\xef\xbb\xbf{"prompt": "a"}\r\n', b'{"prompt": "b"}\r\n') == [
        Request(line=1, prompt="a"),
        Request(line=2, prompt="b"),
    ]


def test_skipped_lines_are_counted_and_not_read() -> None:
    assert read(b"nonsense", b"nonsense", b'{"prompt": "c"}', skip=2) == [Request(line=3, prompt="c")]


def test_line_over_the_limit_is_refused_without_being_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_lines, "MAX_LINE_BYTES", 32)
    file = io.BytesIO(b'{"prompt": "' + b"a" * 500 + b'"}\n{"prompt": "b"}\n' + b'{"prompt": "' + b"c" * 17 + b'"}\n')

    raw = list(split_lines(file))
    first, second, third = read(*raw)

    assert isinstance(first, Result)
    assert first.failure is not None
    assert first.failure.code == "line_too_long"
    assert second == Request(line=2, prompt="b")
    assert third == Request(line=3, prompt="c" * 17)


def test_long_values_are_shortened_in_the_message() -> None:
    _, message = refusal(json.dumps({"prompt": "a", "x" * 10_000: 1}).encode())

    assert len(message) < 500


def test_python_items_become_lines() -> None:
    assert read(encode_item("a\nb"), encode_item({"prompt": "c", "stop": ("x",)})) == [
        Request(line=1, prompt="a\nb"),
        Request(line=2, prompt="c", params=SamplingParams(stop=("x",))),
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
known_names = st.sampled_from(
    ["id", "custom_id", "prompt", "messages", "url", "body", "method", "model", "n", "seed", "stop", "max_tokens"]
)


@given(st.dictionaries(known_names | st.text(max_size=3), json_values, max_size=5))
def test_any_json_object_is_a_request_or_a_refusal(fields: dict[str, Any]) -> None:
    item = read_line(json.dumps(fields).encode(), 1, MODELS)

    assert isinstance(item, Request) or item.failure is not None


@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_a_refusal(raw: bytes) -> None:
    item = read_line(raw, 1, MODELS)

    assert isinstance(item, Request) or item.failure is not None


def test_plain_lines_ask_for_scores_of_pairs_and_of_texts() -> None:
    pair = read_line(b'{"context": "a b ", "continuation": "c", "prompt_logprobs": 3}', 1, ["m"])
    alone = read_line(b'{"continuation": "c"}', 2, ["m"])
    text = read_line(b'{"kind": "score", "text": "a b c", "id": 7}', 3, ["m"])

    params = SamplingParams(prompt_logprobs=3)
    assert pair == Request(line=1, kind="score", context="a b ", continuation="c", params=params)
    assert alone == Request(line=2, kind="score", context="", continuation="c")
    assert text == Request(line=3, kind="score", prompt="a b c", custom_id="7")


@pytest.mark.parametrize("asked", [{"prompt": "a"}, {"continuation": "a"}, {"input": "a"}])
def test_lines_of_every_kind_say_until_when_they_are_of_use(asked: dict[str, str]) -> None:
    item = read_line(encode_item({**asked, "timeout": 5}), 1, ["m"])
    assert isinstance(item, Request)
    assert item.timeout_s(SamplingParams(timeout=60)) == 5
    late = read_line(encode_item({**asked, "timeout": -1}), 1, ["m"])
    assert isinstance(late, Result)
    assert late.failure is not None
    assert "timeout=-1" in late.failure.message


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"kind": "score"}', "missing_field"),
        (b'{"kind": "score", "text": "a", "context": "b"}', "missing_field"),
        (b'{"kind": "score", "text": "a", "continuation": "b"}', "missing_field"),
        (b'{"context": "a"}', "missing_field"),
        (b'{"context": "a", "prompt": "b"}', "unknown_field"),
        (b'{"continuation": ""}', "empty_continuation"),
        (b'{"continuation": 5}', "invalid_type"),
        (b'{"continuation": "a", "prompt": "b"}', "unknown_field"),
        (b'{"continuation": "a", "max_tokens": 5}', "unsupported_parameter"),
        (b'{"continuation": "a", "kind": "generate"}', "invalid_parameter"),
        (b'{"prompt": "a", "kind": "rank"}', "invalid_parameter"),
        (b'{"continuation": "a", "model": "other"}', "unknown_model"),
    ],
)
def test_score_lines_are_refused_by_what_is_wrong_with_them(line: bytes, code: str) -> None:
    refused = read_line(line, 1, ["m"])

    assert isinstance(refused, Result)
    assert refused.failure is not None
    assert refused.failure.code == code


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parameter_that_is_no_number_is_refused_and_not_taken_as_unset(value: float) -> None:
    (failed,) = LineReader([encode_item({"prompt": "a", "temperature": value})], ("m",))
    assert isinstance(failed, Result)
    assert failed.failure is not None
    assert "temperature" in failed.failure.message
