"""The order in which unset parameters are filled: Request, Job, model, OpenAI."""

import json
from pathlib import Path

import pytest

from protocol.errors import ConfigurationError, InvalidRequest
from protocol.requests import Message, Request
from protocol.sampling import SamplingParams
from worker.defaults import read_model_defaults
from worker.preparation import check_token_ids


def write(folder: Path, **values: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_the_request_wins_over_the_job_and_the_job_over_the_model(tmp_path: Path) -> None:
    defaults = read_model_defaults(write(tmp_path, temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=99), None)
    request = Request(line=1, prompt="p", params=SamplingParams(temperature=0.1))
    resolved = defaults.resolve(request, SamplingParams(temperature=0.2, top_p=0.5), 512)
    assert (resolved.temperature, resolved.top_p, resolved.top_k, resolved.max_tokens) == (0.1, 0.5, 20, 99)


def test_everything_a_model_may_state_is_a_default(tmp_path: Path) -> None:
    stated = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    defaults = read_model_defaults(write(tmp_path, **stated, max_new_tokens=99, do_sample=True), None)
    resolved = defaults.resolve(Request(line=1, prompt="p"), SamplingParams(), 512)
    assert {name: getattr(resolved, name) for name in stated} == stated
    assert resolved.max_tokens == 99
    asked = Request(line=1, prompt="p", params=SamplingParams(repetition_penalty=1.0, min_p=0.0))
    resolved = defaults.resolve(asked, SamplingParams(min_p=0.5), 512)
    assert (resolved.repetition_penalty, resolved.min_p) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("stated", "words"), [({"top_p": 7}, "top_p=7.0 is out of range"), ({"top_k": "many"}, r"top_k")]
)
def test_a_model_default_that_cannot_be_used_is_named(stated: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"generation_config\.json.*{words}"):
        read_model_defaults(write(tmp_path, **stated), None)


def test_min_tokens_over_the_default_max_tokens_is_refused(tmp_path: Path) -> None:
    request = Request(line=1, prompt="p", params=SamplingParams(min_tokens=100))
    with pytest.raises(InvalidRequest, match="min_tokens=100 is out of range: it must be at most max_tokens=99"):
        read_model_defaults(write(tmp_path, max_new_tokens=99), None).resolve(request, SamplingParams(), 512)


@pytest.mark.parametrize(
    ("request_", "name", "token"),
    [
        (Request(line=1, prompt_token_ids=(5, 512, 900)), "prompt", 512),
        (Request(line=1, prompt="p", params=SamplingParams(logit_bias={3: 1.0, 600: 1.0})), "logit_bias", 600),
        (Request(line=1, prompt="p", params=SamplingParams(stop_token_ids=(700,))), "stop_token_ids", 700),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused_by_name(
    request_: Request, name: str, token: int, tmp_path: Path
) -> None:
    params = read_model_defaults(tmp_path, None).resolve(request_, SamplingParams(), 512)
    with pytest.raises(InvalidRequest, match=f"{name} has the token id {token}: this model's are from 0 to 511"):
        check_token_ids(request_, params, 512)
    check_token_ids(request_, params, 901)


def test_openai_fills_what_nobody_set(tmp_path: Path) -> None:
    defaults = read_model_defaults(tmp_path, 7)
    prompt = defaults.resolve(Request(line=1, prompt="p"), SamplingParams(), 512)
    chat = defaults.resolve(Request(line=1, messages=(Message("user", "u"),)), SamplingParams(), 512)
    assert (prompt.temperature, prompt.top_p, prompt.n, prompt.max_tokens) == (1.0, 1.0, 1, 16)
    assert chat.max_tokens == 512
    assert defaults.stop_token_ids == (7,)


def test_do_sample_false_means_greedy_and_greedy_ignores_the_rest(tmp_path: Path) -> None:
    defaults = read_model_defaults(write(tmp_path, do_sample=False, top_k=50, eos_token_id=[3, 1]), 1)
    resolved = defaults.resolve(Request(line=1, prompt="p", params=SamplingParams(seed=5)), SamplingParams(), 512)
    assert resolved.is_greedy
    assert resolved.is_cacheable
    assert (resolved.top_k, resolved.seed) == (0, None)
    assert defaults.stop_token_ids == (1, 3)


def test_a_job_default_out_of_range_is_refused_by_name(tmp_path: Path) -> None:
    defaults = read_model_defaults(tmp_path, None)
    with pytest.raises(InvalidRequest, match=r"top_p=1\.5 is out of range"):
        defaults.resolve(Request(line=1, prompt="p"), SamplingParams(top_p=1.5), 512)


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigurationError, match=r"generation_config\.json"):
        read_model_defaults(tmp_path, None)
