"""Sampling parameters: what a caller may set, its limits, and how unset values are resolved."""

import math
from collections.abc import Iterator

import msgspec

from protocol.errors import InvalidRequest

#: Samples per Request: more is better expressed as more Requests, which spread over Chunks.
MAX_SAMPLES = 128
#: Stop strings per Request; OpenAI allows 4, vLLM any number. Each is searched in every new piece of text.
MAX_STOP_STRINGS = 16
#: Token ids per Request that end an answer; each is compared with every new token.
MAX_STOP_TOKEN_IDS = 128
#: Entries of a logit_bias: they travel to the device with every step of their Sequence.
MAX_LOGIT_BIAS = 512
#: Alternatives per token, OpenAI's limit for chat and vLLM's for everything.
MAX_LOGPROBS = 20
#: Logits are divided by it in float32, which must not overflow.
MIN_REPETITION_PENALTY = 1e-6
#: What becomes of a prompt that is too long: an error, or its end, with room for max_tokens of answer.
TRUNCATE_LEFT = "truncate-left"
TOO_LONG = ("error", TRUNCATE_LEFT)
#: Token counts cross to the engine and the database as 32-bit integers.
MAX_TOKEN_COUNT = 2**31 - 1
#: Seconds from a Job's submission: longer than anybody waits, and short enough for any clock.
MAX_TIMEOUT_S = 10 * 366 * 86_400


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Parameters as given; None means unset. Names and meanings are OpenAI's and vLLM's.

    What changes the logits is applied in vLLM's order: min_tokens and logit_bias, then the penalties (repetition over
    prompt and output, frequency and presence over the output alone), temperature, min_p, top_k, top_p. Before
    min_tokens output tokens no stop token is sampled and no stop string ends the answer. Log-probabilities are the
    model's own, before any of this, as vLLM's are by default; `logprobs` is the number of alternatives per token.
    `timeout` is in seconds from the Job's submission: what is not answered by then is an error. It changes no answer.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int | None = None
    stop: tuple[str, ...] | None = None
    ignore_eos: bool | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None  # by token id
    min_tokens: int | None = None
    stop_token_ids: tuple[int, ...] | None = None  # end an answer also with ignore_eos
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    too_long: str | None = None  # one of TOO_LONG: what becomes of a prompt that the engine cannot hold
    timeout: float | None = None

    def validate(self) -> None:
        """Raises InvalidRequest (code `invalid_parameter`) naming the first parameter out of range."""
        for name, value, is_valid, limit in self._checks():
            if value is not None and not is_valid:
                raise InvalidRequest("invalid_parameter", f"{name}={value!r} is out of range: it must be {limit}")

    def _checks(self) -> Iterator[tuple[str, object, bool, str]]:
        t, p, k, stop = self.temperature, self.top_p, self.top_k, self.stop
        limit = f"between 1 and {MAX_TOKEN_COUNT}"
        yield "max_tokens", self.max_tokens, 1 <= (self.max_tokens or 0) <= MAX_TOKEN_COUNT, limit
        yield "temperature", t, t is not None and math.isfinite(t) and 0 <= t <= 2, "between 0 and 2"
        yield "top_p", p, p is not None and 0 < p <= 1, "above 0 and at most 1"
        yield "top_k", k, k is not None and -1 <= k <= MAX_TOKEN_COUNT, f"{limit}, or 0 or -1 for no limit"
        yield "seed", self.seed, self.seed is not None and -(2**63) <= self.seed < 2**63, "a signed 64-bit integer"
        yield "n", self.n, 1 <= (self.n or 0) <= MAX_SAMPLES, f"between 1 and {MAX_SAMPLES}"
        # Of a list what is wrong is shown, not all of it.
        yield "len(stop)", (num := len(stop or ())), num <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS}"
        yield "stop", "", all(stop or ()), "a text that is not empty"
        yield from self._more_checks()

    def _more_checks(self) -> Iterator[tuple[str, object, bool, str]]:
        p, repetition, least, most = self.min_p, self.repetition_penalty, self.min_tokens, self.max_tokens
        yield "min_p", p, p is not None and 0 <= p <= 1, "between 0 and 1"
        is_valid = repetition is not None and MIN_REPETITION_PENALTY <= repetition <= 2
        yield "repetition_penalty", repetition, is_valid, f"between {MIN_REPETITION_PENALTY} and 2"
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            yield name, value, value is not None and -2 <= value <= 2, "between -2 and 2"
        bias = self.logit_bias or {}
        yield "len(logit_bias)", (num := len(bias)), num <= MAX_LOGIT_BIAS, f"at most {MAX_LOGIT_BIAS}"
        for token, value in bias.items():
            yield (
                f"logit_bias[{token}]",
                value,
                0 <= token <= MAX_TOKEN_COUNT,
                f"for a token id, between 0 and {MAX_TOKEN_COUNT}",
            )
            yield f"logit_bias[{token}]", value, -100 <= value <= 100, "between -100 and 100"
        yield "min_tokens", least, 0 <= (least or 0) <= MAX_TOKEN_COUNT, f"between 0 and {MAX_TOKEN_COUNT}"
        if least is not None and most is not None:
            yield "min_tokens", least, least <= most, f"at most max_tokens={most}"
        timeout = self.timeout
        is_valid = timeout is not None and 0 < timeout <= MAX_TIMEOUT_S
        yield "timeout", timeout, is_valid, f"above 0 and at most {MAX_TIMEOUT_S} seconds"
        ids = self.stop_token_ids or ()
        yield "len(stop_token_ids)", (num := len(ids)), num <= MAX_STOP_TOKEN_IDS, f"at most {MAX_STOP_TOKEN_IDS}"
        for token in ids:
            yield "stop_token_ids", token, 0 <= token <= MAX_TOKEN_COUNT, f"a token id, between 0 and {MAX_TOKEN_COUNT}"
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            yield name, value, 0 <= (value or 0) <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"
        yield "too_long", self.too_long, self.too_long in TOO_LONG, " or ".join(TOO_LONG)

    def over(self, lower: "SamplingParams") -> "SamplingParams":
        """These parameters, with what is unset taken from `lower`."""
        fields = {f: getattr(self, f) for f in self.__struct_fields__}
        return SamplingParams(**{f: getattr(lower, f) if v is None else v for f, v in fields.items()})


class ResolvedParams(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters with nothing left open; stored with every Result."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int  # 0: no limit
    seed: int | None
    n: int
    stop: tuple[str, ...]
    ignore_eos: bool
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # as given: those of the model are no parameter
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    # Of an embedding alone, and shown with nothing else.
    dimensions: int | msgspec.UnsetType | None = msgspec.UNSET
    encoding_format: str | msgspec.UnsetType = msgspec.UNSET
    # Shown only where a prompt may be cut, and where one was: by how many tokens at its beginning.
    too_long: str | msgspec.UnsetType = msgspec.UNSET
    truncated_tokens: int | msgspec.UnsetType = msgspec.UNSET

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_cacheable(self) -> bool:
        """Only draws that can be repeated are answers; unseeded ones are fresh draws each time."""
        return self.is_greedy or self.seed is not None


def resolve(params: SamplingParams, *, max_tokens: int) -> ResolvedParams:
    """Close what is still unset with OpenAI's defaults; `max_tokens` is the fallback for that one.

    Greedy decoding makes top_p, top_k, min_p and seed meaningless, so they are set to their neutral values: Requests
    that differ only there have the same answer. Raises InvalidRequest when min_tokens is over that max_tokens.
    """
    temperature = _or(params.temperature, 1.0)
    is_greedy = temperature == 0
    max_tokens = max_tokens if params.max_tokens is None else params.max_tokens
    msgspec.structs.replace(params, max_tokens=max_tokens).validate()
    bias = params.logit_bias or {}
    return ResolvedParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=1.0 if is_greedy else _or(params.top_p, 1.0),
        top_k=0 if is_greedy else max(params.top_k or 0, 0),
        seed=None if is_greedy else params.seed,
        n=params.n or 1,
        stop=params.stop or (),
        ignore_eos=bool(params.ignore_eos),
        min_p=0.0 if is_greedy else _or(params.min_p, 0.0),
        repetition_penalty=_or(params.repetition_penalty, 1.0),
        presence_penalty=_or(params.presence_penalty, 0.0),
        frequency_penalty=_or(params.frequency_penalty, 0.0),
        # In one order, and without what changes nothing: equal biases are equal answers.
        logit_bias={token: float(bias[token]) for token in sorted(bias) if bias[token] != 0},
        min_tokens=params.min_tokens or 0,
        stop_token_ids=tuple(sorted(set(params.stop_token_ids or ()))),
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        too_long=params.too_long if params.too_long == TRUNCATE_LEFT else msgspec.UNSET,
    )


def _or(value: float | None, default: float) -> float:
    # Adding zero turns -0.0 into 0.0, which is another answer key for the same answer otherwise.
    return default if value is None else float(value) + 0.0
