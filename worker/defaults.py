"""Parameters with nothing left open: the Request's own, then its Job's, then the model's, then OpenAI's."""

import json
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import ConfigurationError, InvalidRequest
from protocol.requests import Request
from protocol.sampling import ResolvedParams, SamplingParams, resolve

#: OpenAI's default for /v1/completions, and vLLM's for a bare prompt; a chat answer may fill the context instead.
_COMPLETION_MAX_TOKENS = 16


#: Our names of the defaults a model may state, and what generation_config.json calls them.
_STATED = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}


class ModelDefaults(msgspec.Struct, frozen=True):
    """What a model's `generation_config.json` asks for. `stop_token_ids` end an answer unless `ignore_eos` is set."""

    params: SamplingParams
    stop_token_ids: tuple[int, ...]

    def resolve(self, request: Request, job_params: SamplingParams, context_tokens: int) -> ResolvedParams:
        """Raises InvalidRequest when a parameter is out of range. `context_tokens` bounds an open-ended chat answer."""
        if request.kind == "score":
            return _resolve_score(request.params.over(job_params))
        if request.kind in ("embed", "classify"):
            return _resolve_pooled(request)
        params = request.params.over(job_params).over(self.params)
        return resolve(params, max_tokens=context_tokens if request.messages is not None else _COMPLETION_MAX_TOKENS)


def _resolve_score(params: SamplingParams) -> ResolvedParams:
    """Nothing is drawn for a score, so everything that would decide a draw is neutral: equal texts, equal keys."""
    neutral = SamplingParams(temperature=0, prompt_logprobs=params.prompt_logprobs or 0)
    return msgspec.structs.replace(resolve(neutral, max_tokens=1), max_tokens=0)


def _resolve_pooled(request: Request) -> ResolvedParams:
    neutral = msgspec.structs.replace(
        resolve(SamplingParams(temperature=0), max_tokens=1), max_tokens=0, n=len(request.inputs or (0,))
    )
    if request.kind == "classify":
        return neutral
    return msgspec.structs.replace(
        neutral,
        dimensions=msgspec.UNSET if request.dimensions is None else request.dimensions,
        encoding_format=request.encoding_format,
    )


def read_model_defaults(folder: Path, eos_token_id: int | None) -> ModelDefaults:
    """Reads the file itself and not transformers' GenerationConfig, whose class defaults (top_k 50 among them) cannot
    be told from what the model's author wrote. Raises ConfigurationError when it is not what it should be."""
    path = folder / "generation_config.json"
    values: dict[str, Any] = {}
    if path.is_file():
        try:
            values = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"{path} is not a JSON object: {error}") from error
    stated = {name: values[given] for name, given in _STATED.items() if values.get(given) is not None}
    if values.get("do_sample") is False:
        stated["temperature"] = 0.0
    try:
        params = msgspec.convert(stated, SamplingParams)
        params.validate()
    except (msgspec.ValidationError, InvalidRequest) as error:
        raise ConfigurationError(f"{path} has a default that cannot be used: {error}") from error
    return ModelDefaults(params, _stop_token_ids(folder, values, eos_token_id))


def _stop_token_ids(folder: Path, values: dict[str, Any], eos_token_id: int | None) -> tuple[int, ...]:
    stated = values.get("eos_token_id")
    if stated is None:
        config = folder / "config.json"
        stated = json.loads(config.read_bytes()).get("eos_token_id") if config.is_file() else None
    ids = set(stated) if isinstance(stated, list) else {stated}
    return tuple(sorted({i for i in ids | {eos_token_id} if i is not None}))
