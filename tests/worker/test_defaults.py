"""The order in which unset parameters are filled: Request, Job, model, OpenAI."""

import json
from pathlib import Path

import pytest

from protocol.errors import ConfigurationError, InvalidRequest
from protocol.requests import Message, Request
from protocol.sampling import SamplingParams
from worker.defaults import read_model_defaults


def write(folder: Path, **values: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_the_request_wins_over_the_job_and_the_job_over_the_model(tmp_path: Path) -> None:
    defaults = read_model_defaults(write(tmp_path, temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=99), None)
    request = Request(line=1, prompt="p", params=SamplingParams(temperature=0.1))
    resolved = defaults.resolve(request, SamplingParams(temperature=0.2, top_p=0.5), 512)
    assert (resolved.temperature, resolved.top_p, resolved.top_k, resolved.max_tokens) == (0.1, 0.5, 20, 99)


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
