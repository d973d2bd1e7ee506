"""Sampling parameters: what a caller may set, its limits, and how unset values are resolved."""

import math
from collections.abc import Iterator

import msgspec

from protocol.errors import InvalidRequest

#: Samples per Request: more is better expressed as more Requests, which spread over Chunks.
MAX_SAMPLES = 128
#: Stop strings per Request; OpenAI allows 4, vLLM any number. Each is searched in every new piece of text.
MAX_STOP_STRINGS = 16
#: Token counts cross to the engine and the database as 32-bit integers.
MAX_TOKEN_COUNT = 2**31 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Parameters as given; None means unset. Names and meanings are OpenAI's and vLLM's."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int | None = None
    stop: tuple[str, ...] | None = None
    ignore_eos: bool | None = None

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
        too_many = stop is not None and len(stop) > MAX_STOP_STRINGS
        yield "stop", stop, not too_many and all(stop or ()), f"at most {MAX_STOP_STRINGS} strings, none of them empty"

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

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_cacheable(self) -> bool:
        """Only draws that can be repeated are answers; unseeded ones are fresh draws each time."""
        return self.is_greedy or self.seed is not None


def resolve(params: SamplingParams, *, max_tokens: int) -> ResolvedParams:
    """Close what is still unset with OpenAI's defaults; `max_tokens` is the fallback for that one.

    Greedy decoding makes top_p, top_k and seed meaningless, so they are set to their neutral values: Requests that
    differ only there have the same answer.
    """
    temperature = 1.0 if params.temperature is None else float(params.temperature)
    is_greedy = temperature == 0
    return ResolvedParams(
        max_tokens=max_tokens if params.max_tokens is None else params.max_tokens,
        temperature=temperature,
        top_p=1.0 if params.top_p is None or is_greedy else float(params.top_p),
        top_k=0 if is_greedy else max(params.top_k or 0, 0),
        seed=None if is_greedy else params.seed,
        n=params.n or 1,
        stop=params.stop or (),
        ignore_eos=bool(params.ignore_eos),
    )
