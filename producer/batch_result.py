"""A line's Results as OpenAI's batch output has them: one object for a line, its samples are the choices.

A line of which any sample failed is an error, since an object is either. What was refused has status 400, what went
wrong here 500. A plain line with a prompt is shown as a text completion, one with messages as a chat completion; a
score, which OpenAI does not have, as a list of one.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from producer.result_line import shown_embedding
from protocol.logprobs import Logprobs, unpack_logprobs
from protocol.pooling import unpack_classification
from protocol.requests import Answer, Failure, Result
from protocol.scores import unpack_score
from storage.jobs import Job

#: What is nobody's mistake: everything else that fails was refused for what it asks.
_OUR_FAILURES = frozenset({"engine_died", "engine_refused", "internal_error"})
_LATE = "deadline_exceeded"
_encode = msgspec.json.Encoder().encode


def encode_batch_result(results: Sequence[Result], job: Job, model: str) -> bytes:
    """All of one line's Results, in the order of their samples; line break included. `model` is how the model is
    called. The same Results are always the same bytes: `created` is the Job's time."""
    ordered = sorted(results, key=lambda result: result.sample)
    first, name = ordered[0], f"{job.id}-{ordered[0].line}"
    failure = next((result.failure for result in ordered if result.failure is not None), None)
    answers = [result.answer for result in ordered if result.answer is not None]
    if failure is not None:
        status, body = _error(failure)
    else:
        head = {"created": int(job.created_at), "model": model}
        status, body = 200, _body(ordered, answers, name, head)
    if first.carried is not None:
        body |= msgspec.json.decode(first.carried)
    response = {"status_code": status, "request_id": f"req-{name}", "body": body}
    line = {"id": f"batch_req-{name}", "custom_id": first.custom_id, "response": response, "error": None}
    return _encode(line) + b"\n"


def _error(failure: Failure) -> tuple[int, dict[str, Any]]:
    status, kind = (500, "server_error") if failure.code in _OUR_FAILURES else (400, "invalid_request_error")
    if failure.code == _LATE:
        status, kind = 408, "timeout_error"
    return status, {"error": {"message": failure.message, "type": kind, "param": None, "code": failure.code}}


def _body(results: Sequence[Result], answers: Sequence[Answer], name: str, head: dict[str, Any]) -> dict[str, Any]:
    first, params = answers[0], results[0].params
    prompt_tokens = first.prompt_tokens
    if first.embedding is not None or first.classification is not None:
        prompt_tokens = sum(answer.prompt_tokens for answer in answers)  # each sample is a text of its own
    completion_tokens = sum(answer.completion_tokens for answer in answers)
    usage: dict[str, Any] = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + completion_tokens}
    if first.embedding is not None:
        return {"object": "list", "data": [_embedding(result) for result in results], **head, "usage": usage}
    if first.classification is not None:
        data = [_classification(result.sample, answer) for result, answer in zip(results, answers, strict=True)]
        return {"id": f"classify-{name}", "object": "list", **head, "data": data, "usage": usage}
    usage["completion_tokens"] = completion_tokens
    if params is not None and params.max_tokens == 0 and first.score is not None:
        score = {"object": "score", "index": 0, **msgspec.to_builtins(unpack_score(first.score))}
        return {"id": f"score-{name}", "object": "list", **head, "data": [score], "usage": usage}
    is_chat = results[0].endpoint == "/v1/chat/completions"
    choices = [_choice(result.sample, answer, is_chat) for result, answer in zip(results, answers, strict=True)]
    kind, prefix = ("chat.completion", "chatcmpl") if is_chat else ("text_completion", "cmpl")
    return {"id": f"{prefix}-{name}", "object": kind, **head, "choices": choices, "usage": usage}


def _choice(index: int, answer: Answer, is_chat: bool) -> dict[str, Any]:
    logprobs = None if answer.logprobs is None else unpack_logprobs(answer.logprobs)
    choice: dict[str, Any] = {"index": index, "finish_reason": answer.finish_reason}
    if is_chat:
        choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        choice["logprobs"] = logprobs
    else:
        choice["text"] = answer.text
        choice["logprobs"] = None if logprobs is None else _completion_logprobs(logprobs)
    if answer.score is not None:
        choice["prompt_logprobs"] = unpack_score(answer.score)
    return choice


def _completion_logprobs(logprobs: Logprobs) -> dict[str, Any]:
    """The older of OpenAI's two shapes: lists side by side, offsets in characters of the text."""
    tokens = [token.token for token in logprobs.content]
    offsets, length = [], 0
    for token in tokens:
        offsets.append(length)
        length += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [token.logprob for token in logprobs.content],
        "top_logprobs": [{top.token: top.logprob for top in token.top_logprobs} for token in logprobs.content],
        "text_offset": offsets,
    }


def _embedding(result: Result) -> dict[str, Any]:
    return {"object": "embedding", "index": result.sample, "embedding": shown_embedding(result)}


def _classification(index: int, answer: Answer) -> dict[str, Any]:
    assert answer.classification is not None
    found = unpack_classification(answer.classification)
    return {"index": index, **msgspec.to_builtins(found), "num_classes": len(found.labels)}
