"""Embeddings and classifications on the worker's side: what an engine can do, a Request per input, and its Answer."""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from protocol.errors import InvalidRequest
from protocol.frames import EngineReady
from protocol.pooling import pack_classification
from protocol.requests import Answer, Kind, Request
from protocol.sampling import ResolvedParams

#: What an engine of each task can do.
KINDS: dict[str, tuple[Kind, ...]] = {"generate": ("generate", "score"), "embed": ("embed",), "classify": ("classify",)}


def check_kind(request: Request, engine: EngineReady) -> None:
    """Raises InvalidRequest when engines that are ready like this one cannot do the Request."""
    kinds = KINDS[engine.task]
    if request.kind not in kinds:
        raise InvalidRequest(
            "unsupported_kind",
            f"this model is served for {' and '.join(kinds)}, and {request.kind} was asked for: send it to a model "
            "that does that, or serve this one with another MILLRACE_ENGINE_TASK and run the same with --retry-errors",
        )
    if request.dimensions is not None and request.dimensions > engine.num_dimensions:
        raise InvalidRequest(
            "invalid_dimensions",
            f"dimensions={request.dimensions}, but this model's embeddings have {engine.num_dimensions}: ask for at "
            "most that, or leave it out",
        )


def samples_of(request: Request, num_samples: int) -> Iterator[Request]:
    """The Request of each sample: itself, or one input of several."""
    if request.inputs is None:
        yield from (request for _ in range(num_samples))
        return
    for each in request.inputs:
        text, token_ids = (each, None) if isinstance(each, str) else (None, each)
        yield msgspec.structs.replace(request, inputs=None, prompt=text, prompt_token_ids=token_ids)


def pooled_answer(values: bytes, labels: Sequence[str], params: ResolvedParams, num_prompt_tokens: int) -> Answer:
    """From the engine's little-endian float32: the Answer to a classification where there are labels, else an
    embedding, cut to as many dimensions as were asked for."""
    embedding = classification = None
    text = ""
    if labels:
        text = labels[int(np.frombuffer(values, dtype="<f4").argmax())]
        classification = pack_classification(labels, values)
    else:
        embedding = _cut(values, params.dimensions) if isinstance(params.dimensions, int) else values
    return Answer(
        text=text,
        finish_reason="stop",
        prompt_tokens=num_prompt_tokens,
        completion_tokens=0,
        embedding=embedding,
        classification=classification,
    )


def _cut(values: bytes, num_dimensions: int) -> bytes:
    """A beginning of a normalised embedding is normalised anew; of another it is left as it is."""
    whole = np.frombuffer(values, dtype="<f4")
    part = whole[:num_dimensions]
    if abs(np.linalg.norm(whole) - 1) < 1e-3 and (length := np.linalg.norm(part)) > 0:
        part = part / length
    return part.astype("<f4").tobytes()
