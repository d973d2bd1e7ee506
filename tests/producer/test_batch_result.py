"""OpenAI's batch output, read back by OpenAI's own types."""

import json
import struct
from typing import Any

import msgspec
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from producer.batch_result import encode_batch_result
from producer.line_results import whole_lines
from protocol.logprobs import pack_logprobs
from protocol.packing import pack_ints
from protocol.pooling import pack_classification
from protocol.requests import Answer, Failure, Result
from protocol.sampling import SamplingParams, resolve
from protocol.scores import ScoredTokens, pack_score
from storage.jobs import Job

JOB = Job("0123456789abcdef", "default", "x", "private-name", SamplingParams(), "finished", 1_700_000_000.9, 5)
PARAMS = resolve(SamplingParams(n=2), max_tokens=16)
TEXTS = {7: " né".encode(), 9: b"b"}
LOGPROBS = pack_logprobs(
    [7, 9], [struct.pack("<f2i2f", -0.5, 7, 9, -0.5, -1.5), struct.pack("<f2i2f", -2, 9, 7, -2, -3)], TEXTS.__getitem__
)


def answered(line: int = 3, sample: int = 0, **fields: Any) -> Result:
    given = {"text": f"answer {sample}", "finish_reason": "stop", "prompt_tokens": 4, "completion_tokens": 2}
    answer = msgspec.convert({**given, **fields}, Answer)
    return Result(
        line=line, sample=sample, custom_id="a", endpoint="/v1/chat/completions", answer=answer, params=PARAMS
    )


def written(*results: Result) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(encode_batch_result(results, JOB, "tiny"))
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert line["error"] is None
    return line


def with_endpoint(endpoint: str, *results: Result) -> list[Result]:
    return [msgspec.structs.replace(result, endpoint=endpoint) for result in results]


def test_samples_are_the_choices_of_one_chat_completion() -> None:
    second, first = answered(sample=1, finish_reason="length"), answered(sample=0, logprobs=LOGPROBS)
    line = written(second, first)

    assert (line["id"], line["custom_id"]) == ("batch_req-0123456789abcdef-3", "a")
    assert line["response"]["status_code"] == 200
    assert line["response"]["request_id"] == "req-0123456789abcdef-3"
    completion = ChatCompletion.model_validate(line["response"]["body"], strict=True)
    assert (completion.id, completion.model, completion.created) == ("chatcmpl-0123456789abcdef-3", "tiny", 1700000000)
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert [choice.message.content for choice in completion.choices] == ["answer 0", "answer 1"]
    assert [choice.finish_reason for choice in completion.choices] == ["stop", "length"]
    assert completion.usage is not None
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 4, 8)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(token.token, token.logprob) for token in logprobs.content] == [(" né", -0.5), ("b", -2)]
    assert logprobs.content[0].top_logprobs[1].token == "b"


def test_completions_have_their_own_shape_of_text_and_logprobs() -> None:
    body = written(*with_endpoint("/v1/completions", answered(logprobs=LOGPROBS)))["response"]["body"]

    completion = Completion.model_validate(body, strict=True)
    assert (completion.object, completion.choices[0].text) == ("text_completion", "answer 0")
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.token_logprobs) == ([" né", "b"], [-0.5, -2])
    assert logprobs.text_offset == [0, 3]
    assert logprobs.top_logprobs == [{" né": -0.5, "b": -1.5}, {"b": -2, " né": -3}]


def test_embeddings_are_a_list_with_an_entry_for_each_input() -> None:
    vectors = [struct.pack("<2f", 0.5, number) for number in range(2)]
    results = [answered(sample=i, text="", completion_tokens=0) for i in range(2)]
    results = [
        msgspec.structs.replace(result, answer=msgspec.structs.replace(result.answer, embedding=vector))
        for result, vector in zip(with_endpoint("/v1/embeddings", *results), vectors, strict=True)
        if result.answer is not None
    ]

    response = CreateEmbeddingResponse.model_validate(written(*results)["response"]["body"], strict=True)

    assert [entry.embedding for entry in response.data] == [[0.5, 0.0], [0.5, 1.0]]
    assert [entry.index for entry in response.data] == [0, 1]
    assert (response.model, response.usage.prompt_tokens, response.usage.total_tokens) == ("tiny", 8, 8)


def test_classifications_and_scores_are_lists() -> None:
    packed = pack_classification(["bad", "good"], struct.pack("<2f", 0.25, 0.75))
    result = answered()
    assert result.answer is not None
    classified = msgspec.structs.replace(
        result, answer=msgspec.structs.replace(result.answer, classification=packed, completion_tokens=0)
    )
    tokens = ScoredTokens(pack_ints([9]), struct.pack("<f", -0.5), pack_ints([1]), 0, b"", b"", TEXTS)
    scored = msgspec.structs.replace(
        result,
        answer=msgspec.structs.replace(result.answer, score=pack_score(tokens), completion_tokens=0),
        params=msgspec.structs.replace(PARAMS, max_tokens=0),
        endpoint="plain",
    )

    label = written(classified)["response"]["body"]
    score = written(scored)["response"]["body"]

    assert label["data"] == [
        {"index": 0, "label": "good", "probs": [0.25, 0.75], "labels": ["bad", "good"], "num_classes": 2}
    ]
    assert score["data"][0]["logprob"] == -0.5
    assert score["data"][0]["tokens"][0]["token"] == "b"


def test_a_line_of_which_a_sample_failed_is_an_error_as_in_openais_error_file() -> None:
    failed = Result(line=3, sample=1, custom_id="a", failure=Failure("engine_died", "it died"), params=PARAMS)
    refused = Result(line=4, failure=Failure("invalid_json", "no"), carried='{"user":"u"}')

    ours, theirs = written(answered(), failed), written(refused)

    assert ours["response"] == {
        "status_code": 500,
        "request_id": "req-0123456789abcdef-3",
        "body": {"error": {"message": "it died", "type": "server_error", "param": None, "code": "engine_died"}},
    }
    assert theirs["custom_id"] is None
    assert theirs["response"]["status_code"] == 400
    assert theirs["response"]["body"]["error"]["type"] == "invalid_request_error"
    assert theirs["response"]["body"]["user"] == "u"


def test_what_a_line_carries_stands_in_its_body() -> None:
    carried = msgspec.structs.replace(answered(), carried='{"metadata":{"k":"v"},"store":false}')
    body = written(carried)["response"]["body"]

    assert (body["metadata"], body["store"]) == ({"k": "v"}, False)


def test_lines_are_given_once_they_are_whole() -> None:
    refused = Result(line=9, failure=Failure("invalid_json", "no"))
    stream = [answered(1, 0), answered(2, 1), refused, answered(2, 0), answered(1, 1), answered(5, 0)]

    lines = [[(r.line, r.sample) for r in line] for line in whole_lines(stream, is_in_order=False)]

    assert lines == [[(9, 0)], [(2, 1), (2, 0)], [(1, 0), (1, 1)], [(5, 0)]]


def test_a_gap_keeps_no_later_line_waiting_where_they_come_in_order() -> None:
    stream = iter([answered(1, 0), answered(2, 0), answered(2, 1), answered(3, 0)])
    lines = whole_lines(stream, is_in_order=True)

    assert [(r.line, r.sample) for r in next(lines)] == [(1, 0)]
    assert [(r.line, r.sample) for r in next(lines)] == [(2, 0), (2, 1)]
    assert next(stream) == answered(3, 0), "nothing was read ahead"
