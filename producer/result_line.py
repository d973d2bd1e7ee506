"""ResultLine: a Result as one JSON object, the flat format.

Every object has the same keys: `line` and `sample` say which, `custom_id` is the caller's; `text`, `finish_reason` and
`usage` are null in an error, `error` is null in an answer; `cached` says that nothing was computed for it; `params` are
the resolved parameters, null when the line was refused before they were known. `logprobs` is there only where they were
asked for, in OpenAI's shape. `score` is there for lines of kind score and for prompt_logprobs: protocol.scores.Score.
`embedding` is there for lines of kind embed: numbers, or base64 where that was asked for; `classification` for lines of
kind classify, whose `text` is the label: protocol.pooling.Classification. `user`, `metadata` and `store` are there for
lines that have them.
"""

from typing import Any

import msgspec

from protocol.logprobs import Logprobs, unpack_logprobs
from protocol.pooling import Classification, show_embedding, unpack_classification
from protocol.requests import Failure, Result
from protocol.sampling import ResolvedParams
from protocol.scores import Score, unpack_score


class Usage(msgspec.Struct, frozen=True):
    """Tokens, as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: int


class ResultLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the file; the fields' order is the keys' order."""

    line: int
    sample: int
    custom_id: str | None
    text: str | None
    finish_reason: str | None
    usage: Usage | None
    cached: bool
    error: Failure | None
    params: ResolvedParams | None
    logprobs: Logprobs | msgspec.UnsetType = msgspec.UNSET
    score: Score | msgspec.UnsetType = msgspec.UNSET
    embedding: list[float] | str | msgspec.UnsetType = msgspec.UNSET
    classification: Classification | msgspec.UnsetType = msgspec.UNSET
    user: str | msgspec.UnsetType = msgspec.UNSET
    metadata: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    store: bool | msgspec.UnsetType = msgspec.UNSET


_encode = msgspec.json.Encoder().encode


def encode_result(result: Result) -> bytes:
    """The Result's line, line break included."""
    return _encode(to_line(result)) + b"\n"


def to_line(result: Result) -> ResultLine:
    answer = result.answer
    return ResultLine(
        line=result.line,
        sample=result.sample,
        custom_id=result.custom_id,
        text=None if answer is None else answer.text,
        finish_reason=None if answer is None else answer.finish_reason,
        usage=None if answer is None else Usage(answer.prompt_tokens, answer.completion_tokens),
        cached=result.is_cached,
        error=result.failure,
        params=result.params,
        logprobs=msgspec.UNSET if answer is None or answer.logprobs is None else unpack_logprobs(answer.logprobs),
        score=msgspec.UNSET if answer is None or answer.score is None else unpack_score(answer.score),
        embedding=shown_embedding(result),
        classification=msgspec.UNSET
        if answer is None or answer.classification is None
        else unpack_classification(answer.classification),
        **({} if result.carried is None else msgspec.json.decode(result.carried)),
    )


def shown_embedding(result: Result) -> list[float] | str | msgspec.UnsetType:
    """As it was asked for; UNSET where there is none."""
    if result.answer is None or result.answer.embedding is None:
        return msgspec.UNSET
    is_base64 = result.params is not None and result.params.encoding_format == "base64"
    return show_embedding(result.answer.embedding, "base64" if is_base64 else "float")
