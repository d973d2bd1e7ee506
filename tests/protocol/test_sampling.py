"""Limits of the sampling parameters, what resolving makes of them, and that each of them is part of an answer's key."""

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from protocol.errors import InvalidRequest
from protocol.requests import Message, Request, answer_key
from protocol.sampling import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, MAX_TIMEOUT_S, ResolvedParams, SamplingParams, resolve


@dataclass(frozen=True)
class Limits:
    """Values of one parameter: just within its range, and just outside."""

    name: str
    inside: tuple[Any, ...]
    outside: tuple[Any, ...]


NAN, INF = float("nan"), float("inf")
LIMITS = [
    Limits("max_tokens", (1, 2**31 - 1), (0, -1, 2**31)),
    Limits("temperature", (0, 2), (-0.1, 2.1, NAN, INF)),
    Limits("top_p", (1e-9, 1), (0, 1.01, NAN)),
    Limits("top_k", (-1, 0, 2**31 - 1), (-2, 2**31)),
    Limits("seed", (-(2**63), 2**63 - 1), (2**63, -(2**63) - 1)),
    Limits("n", (1, 128), (0, 129)),
    Limits("stop", ((), ("a",) * 16), (("a",) * 17, ("",))),
    Limits("ignore_eos", (True, False), ()),
    Limits("min_p", (0, 1), (-0.1, 1.1, NAN)),
    Limits("repetition_penalty", (1e-6, 2), (0, 1e-300, -1, 2.1, NAN, INF)),
    Limits("presence_penalty", (-2, 2), (-2.1, 2.1, NAN)),
    Limits("frequency_penalty", (-2, 2), (-2.1, 2.1, NAN)),
    Limits(
        "logit_bias",
        ({}, {0: -100, 5: 100}, dict.fromkeys(range(MAX_LOGIT_BIAS), 1)),
        ({-1: 1}, {2**31: 1}, {5: 100.1}, {5: NAN}, dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1)),
    ),
    Limits("min_tokens", (0, 100), (-1, 2**31)),
    Limits("stop_token_ids", ((), (0, 5) * (MAX_STOP_TOKEN_IDS // 2)), ((-1,), (5,) * (MAX_STOP_TOKEN_IDS + 1))),
    Limits("logprobs", (0, 20), (-1, 21)),
    Limits("prompt_logprobs", (0, 20), (-1, 21)),
    Limits("too_long", ("error", "truncate-left"), ("truncate", "")),
    Limits("timeout", (1e-3, MAX_TIMEOUT_S), (0, -1, MAX_TIMEOUT_S + 1, NAN, INF)),
]


def test_every_parameter_has_its_limits_tested() -> None:
    assert {limits.name for limits in LIMITS} == set(SamplingParams.__struct_fields__)
    of_embeddings = {"dimensions", "encoding_format"}  # are a Request's, and checked where it is read
    changes_no_answer = {"timeout"}
    found_by_worker = {"truncated_tokens"}
    resolved = set(ResolvedParams.__struct_fields__)
    assert {limits.name for limits in LIMITS} - changes_no_answer == resolved - of_embeddings - found_by_worker


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: limits.name)
def test_parameter_is_accepted_within_its_range_and_refused_by_name_outside(limits: Limits) -> None:
    for value in limits.inside:
        SamplingParams(**{limits.name: value}).validate()
    for value in limits.outside:
        with pytest.raises(InvalidRequest, match=rf"^(len\()?{limits.name}.* is out of range") as refused:
            SamplingParams(**{limits.name: value}).validate()
        assert refused.value.code == "invalid_parameter"


def test_min_tokens_over_max_tokens_is_refused_also_when_max_tokens_is_a_default() -> None:
    SamplingParams(min_tokens=5, max_tokens=5).validate()
    with pytest.raises(InvalidRequest, match="min_tokens=6 is out of range: it must be at most max_tokens=5"):
        SamplingParams(min_tokens=6, max_tokens=5).validate()
    with pytest.raises(InvalidRequest, match="min_tokens=17 is out of range: it must be at most max_tokens=16"):
        resolve(SamplingParams(min_tokens=17), max_tokens=16)


def test_what_nobody_sets_changes_nothing() -> None:
    assert resolve(SamplingParams(), max_tokens=16) == ResolvedParams(
        max_tokens=16, temperature=1.0, top_p=1.0, top_k=0, seed=None, n=1, stop=(), ignore_eos=False
    )


def test_greedy_keeps_what_changes_logits_and_drops_what_only_shapes_draws() -> None:
    given = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.2, seed=4, repetition_penalty=1.5, min_tokens=2)
    resolved = resolve(given, max_tokens=16)

    assert (resolved.top_p, resolved.top_k, resolved.min_p, resolved.seed) == (1.0, 0, 0.0, None)
    assert (resolved.repetition_penalty, resolved.min_tokens) == (1.5, 2)


def test_biases_that_mean_the_same_resolve_to_the_same() -> None:
    one = resolve(SamplingParams(logit_bias={7: 1, 3: -2, 5: 0}, stop_token_ids=(4, 1, 4)), max_tokens=16)
    two = resolve(SamplingParams(logit_bias={3: -2.0, 7: 1.0}, stop_token_ids=(1, 4)), max_tokens=16)

    assert msgspec.json.encode(one) == msgspec.json.encode(two)


def key(params: ResolvedParams, request: Request | None = None, sample: int = 0) -> bytes:
    return answer_key("tenant", "model", request or Request(line=1, prompt="a"), params, sample)


def test_answer_key_changes_with_every_parameter_that_can_change_the_answer() -> None:
    base = resolve(SamplingParams(seed=1), max_tokens=16)
    changes: dict[str, Any] = {
        "max_tokens": 17,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "seed": 2,
        "stop": ("a",),
        "ignore_eos": True,
        "min_p": 0.5,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {5: 1.0},
        "min_tokens": 1,
        "stop_token_ids": (5,),
        "logprobs": 0,
        "prompt_logprobs": 0,
        "dimensions": 5,
    }
    # n only says how many samples there are, encoding_format only how they are shown; what was cut has other tokens.
    same: dict[str, Any] = {"n": 5, "encoding_format": "base64", "too_long": "truncate-left", "truncated_tokens": 3}
    assert set(changes) == set(ResolvedParams.__struct_fields__) - set(same)

    keys = {key(base), *(key(msgspec.structs.replace(base, **{name: value})) for name, value in changes.items())}

    assert len(keys) == len(changes) + 1
    assert key(msgspec.structs.replace(base, **same)) == key(base)
    assert key(base, sample=1) != key(base)


def test_answer_key_tells_contents_apart_and_ignores_the_order_of_biases() -> None:
    params = resolve(SamplingParams(temperature=0), max_tokens=16)
    requests = [
        Request(line=1, prompt="a"),
        Request(line=1, prompt_token_ids=(97,)),
        Request(line=1, prompt_token_ids=(97, 97)),
        Request(line=1, messages=(Message("user", "a"),)),
    ]
    assert len({key(params, request) for request in requests}) == 4
    biased = [msgspec.structs.replace(params, logit_bias=bias) for bias in ({1: 2.0, 3: 4.0}, {3: 4.0, 1: 2.0})]
    assert key(biased[0]) == key(biased[1])


def test_parameters_survive_json_and_msgpack() -> None:
    params = SamplingParams(logit_bias={5: 1.5}, stop_token_ids=(3,), logprobs=2, min_p=0.25)
    resolved = resolve(params, max_tokens=16)

    for codec in (msgspec.json, msgspec.msgpack):
        assert codec.decode(codec.encode(params), type=SamplingParams) == params
        assert codec.decode(codec.encode(resolved), type=ResolvedParams) == resolved
    assert b'"logit_bias":{"5":1.5}' in msgspec.json.encode(resolved)


def test_negative_zero_is_zero_also_in_the_answer_key() -> None:
    given = SamplingParams(temperature=-0.0, presence_penalty=-0.0, frequency_penalty=-0.0, min_p=-0.0)
    assert str(resolve(given, max_tokens=5)) == str(resolve(SamplingParams(temperature=0), max_tokens=5))
