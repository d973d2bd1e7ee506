"""Request and Result: one prompt with its parameters, and its stored outcome."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import zstandard

from protocol.sampling import ResolvedParams, SamplingParams

#: Where a Request came from decides its output shape and, as at OpenAI, its default max_tokens.
Endpoint = Literal["plain", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/classify"]
Kind = Literal["generate", "score", "embed", "classify"]
#: How an embedding is shown: its storage is the same.
EncodingFormat = Literal["float", "base64"]

#: zstd level of stored Chunks: 3 is the library's default and compresses JSON-like text at several hundred MB/s.
_COMPRESSION_LEVEL = 3


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One chat message; content is text."""

    role: str
    content: str


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt with its parameters; `line` counts from 1.

    To generate, exactly one of `prompt`, `prompt_token_ids` and `messages` is set. To score, either `prompt`, all of
    whose tokens are scored, or `continuation`, scored behind `context`. To embed or classify, `prompt` or
    `prompt_token_ids`, or several of them in `inputs`, each of which is a sample of the Result.
    """

    line: int
    kind: Kind = "generate"
    endpoint: Endpoint = "plain"
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    custom_id: str | None = None
    params: SamplingParams = SamplingParams()
    prompt_token_ids: tuple[int, ...] | None = None
    context: str | None = None
    continuation: str | None = None
    inputs: tuple[str | tuple[int, ...], ...] | None = None
    dimensions: int | None = None  # of an embedding: so many of its first, None: all
    encoding_format: EncodingFormat = "float"  # of an embedding
    carried: str | None = None  # the caller's user, metadata and store as a JSON object, for the Result to show

    def timeout_s(self, job_params: SamplingParams) -> float | None:
        """Seconds from the Job's submission until it is late; None: never."""
        return self.params.timeout if self.params.timeout is not None else job_params.timeout


class Failure(msgspec.Struct, frozen=True):
    """Why a Request has no answer: a stable code and a sentence for people."""

    code: str
    message: str


def deadline_exceeded(timeout_s: float) -> Failure:
    return Failure(
        "deadline_exceeded", f"there was no answer within timeout={timeout_s:g} seconds from submission: submit it anew"
    )


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the model said for one sample; depends on nothing but the answer key."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    logprobs: bytes | None = None  # protocol.logprobs.pack_logprobs; None when not asked for
    score: bytes | None = None  # protocol.scores.pack_score, of the prompt's tokens; None when not asked for
    embedding: bytes | None = None  # little-endian float32; None for other kinds
    classification: bytes | None = None  # protocol.pooling.pack_classification; None for other kinds


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The stored outcome of one sample of a Request: exactly one of `answer` and `failure` is set."""

    line: int
    sample: int = 0
    custom_id: str | None = None
    endpoint: Endpoint = "plain"
    answer: Answer | None = None
    failure: Failure | None = None
    carried: str | None = None  # the Request's
    is_cached: bool = False  # the answer was known or shared with an equal Request: nothing was computed for it
    params: ResolvedParams | None = None  # None when the Request failed before its parameters were resolved
    seconds: float = 0.0  # from claiming the Chunk to having the answer

    @classmethod
    def failed(
        cls,
        request: Request,
        failure: Failure,
        sample: int,
        params: ResolvedParams | None = None,
        seconds: float = 0.0,
    ) -> "Result":
        """That there is no answer to a sample of this Request."""
        return cls(
            line=request.line,
            sample=sample,
            custom_id=request.custom_id,
            carried=request.carried,
            endpoint=request.endpoint,
            failure=failure,
            params=params,
            seconds=seconds,
        )


_NOT_IN_KEY = ("n", "encoding_format", "too_long", "truncated_tokens")

_encode = msgspec.msgpack.Encoder().encode
_decode_requests = msgspec.msgpack.Decoder(list[Request]).decode


def first_timeout(requests: Sequence[Request], job_params: SamplingParams) -> float | None:
    """Seconds from the Job's submission until the first of them is late; None: none ever is."""
    timeouts = (request.timeout_s(job_params) for request in requests)
    return min((timeout_s for timeout_s in timeouts if timeout_s is not None), default=None)


def pack_requests(requests: Sequence[Request]) -> bytes:
    """A Chunk's Requests as one compressed blob."""
    return zstandard.compress(_encode(requests), _COMPRESSION_LEVEL)


def unpack_requests(blob: bytes) -> list[Request]:
    """The inverse of `pack_requests`."""
    return _decode_requests(zstandard.decompress(blob))


def answer_key(tenant: str, fingerprint: str, request: Request, params: ResolvedParams, sample: int) -> bytes:
    """32 bytes that name an answer: equal keys have equal answers.

    SHA-256 over everything that can change the answer. `n` only says how many samples there are, how an embedding is
    shown does not change it, and all greedy samples are the same one, so none of them enters the key. Nor does what
    becomes of prompts that are too long: one that was cut is a Request of the tokens that are left.
    """
    if not params.is_cacheable:
        raise ValueError("an unseeded draw has no answer key")
    fields = [name for name in params.__struct_fields__ if name not in _NOT_IN_KEY]
    parameters: list[Any] = [getattr(params, name) for name in fields]
    parameters = [sorted(value.items()) if isinstance(value, dict) else value for value in parameters]
    parameters = [None if value is msgspec.UNSET else value for value in parameters]
    parameters.append(0 if params.is_greedy else sample)
    content = [3, tenant, fingerprint, request.kind, request.prompt, request.prompt_token_ids, request.messages]
    content += [request.context, request.continuation]
    return hashlib.sha256(_encode([*content, parameters])).digest()
