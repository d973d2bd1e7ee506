"""Reply: what a call returns. JSON to the caller, who gets plain builtins, and counts to everybody who looks on."""

from collections.abc import Sequence
from typing import Any

import msgspec

from protocol.logprobs import unpack_logprobs
from protocol.pooling import show_embedding, unpack_classification
from protocol.requests import Answer, Failure, Result
from protocol.scores import unpack_score

#: Codes of failures that no other Request would have avoided.
_OURS = ("engine_died", "engine_refused", "internal_error")


class Reply:
    """Of a call's Results, which are in the order of their samples and all answers.

    The mapping has the keys of a results file's line: `text`, `finish_reason`, `usage`, `cached`, and `logprobs`,
    `score`, `embedding` or `classification` where they belong. Of several samples it is the first one's, and `samples`
    has all of them.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        self._results = results

    def __json__(self) -> dict[str, Any]:
        """How kombu encodes it."""
        samples = [_shown(result) for result in self._results]
        return samples[0] if len(samples) == 1 else {**samples[0], "samples": samples}

    def __repr__(self) -> str:
        """What Celery logs and tells Flower."""
        answers = [result.answer for result in self._results if result.answer is not None]
        num_prompt_tokens, num_tokens = answers[0].prompt_tokens, sum(a.completion_tokens for a in answers)
        known = " (known)" if all(result.is_cached for result in self._results) else ""
        samples = "1 answer" if len(answers) == 1 else f"{len(answers)} answers"
        return f"{samples}{known}, {num_prompt_tokens} tokens in, {num_tokens} out"


class CallExpired(Exception):
    """Nobody is told of it by this name: Celery has an error of its own for tasks that have expired."""


def error_of(failure: Failure) -> Exception:
    """What the caller's `get()` raises. A builtin, since a foreign app has none of our classes."""
    return (RuntimeError if failure.code in _OURS else ValueError)(f"{failure.code}: {failure.message}")


def _shown(result: Result) -> dict[str, Any]:
    answer = result.answer
    assert answer is not None
    return {
        "text": None if answer.score is not None and answer.completion_tokens == 0 else answer.text,
        "finish_reason": answer.finish_reason,
        "usage": {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens},
        "cached": result.is_cached,
        **_details(answer, is_base64=result.params is not None and result.params.encoding_format == "base64"),
    }


def _details(answer: Answer, *, is_base64: bool) -> dict[str, Any]:
    details: dict[str, Any] = {}
    if answer.logprobs is not None:
        details["logprobs"] = msgspec.to_builtins(unpack_logprobs(answer.logprobs))
    if answer.score is not None:
        details["score"] = msgspec.to_builtins(unpack_score(answer.score))
    if answer.embedding is not None:
        details["embedding"] = show_embedding(answer.embedding, "base64" if is_base64 else "float")
    if answer.classification is not None:
        details["classification"] = msgspec.to_builtins(unpack_classification(answer.classification))
    return details
