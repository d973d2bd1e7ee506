"""Embeddings and classifications between the queue and the engine, with the engine's own words."""

import struct
from pathlib import Path

import msgspec
import pytest

from protocol.errors import InvalidRequest
from protocol.frames import EngineReady, Intake, StepFrame
from protocol.pooling import unpack_classification
from protocol.requests import Answer, Failure, Request
from protocol.sampling import ResolvedParams, SamplingParams
from tests.worker.recording_owner import RecordingOwner
from worker.defaults import read_model_defaults
from worker.generations import Generation, Generations, Piece
from worker.pooled import check_kind, pooled_answer, samples_of
from worker.text import Tokenizer

READY = EngineReady("model", 512, 4096, 16, 16, "cpu", "float32", "sdpa", {})
EMBEDDING = struct.pack("<4f", 0.5, -0.5, 0.5, 0.5)


def resolve(request: Request) -> ResolvedParams:
    return read_model_defaults(Path("/nowhere"), None).resolve(request, SamplingParams(temperature=0.5), 512)


def test_a_kind_that_the_model_is_not_served_for_is_refused_with_the_way_out() -> None:
    embed = Request(line=1, kind="embed", prompt="a")

    check_kind(embed, msgspec.structs.replace(READY, task="embed"))
    with pytest.raises(InvalidRequest, match="served for generate and score, and embed was asked for") as refused:
        check_kind(embed, READY)
    assert refused.value.code == "unsupported_kind"
    with pytest.raises(InvalidRequest, match="served for classify, and generate was asked for"):
        check_kind(Request(line=1, prompt="a"), msgspec.structs.replace(READY, task="classify"))


def test_more_dimensions_than_the_model_has_are_refused() -> None:
    engine = msgspec.structs.replace(READY, task="embed", num_dimensions=4)

    check_kind(Request(line=1, kind="embed", prompt="a", dimensions=4), engine)
    with pytest.raises(InvalidRequest, match="dimensions=5, but this model's embeddings have 4"):
        check_kind(Request(line=1, kind="embed", prompt="a", dimensions=5), engine)


def test_each_input_is_a_sample() -> None:
    request = Request(line=3, kind="embed", inputs=("a", (5, 6)), custom_id="x")
    params = resolve(request)

    assert (params.n, params.max_tokens, params.is_cacheable) == (2, 0, True)
    assert list(samples_of(request, params.n)) == [
        Request(line=3, kind="embed", prompt="a", custom_id="x"),
        Request(line=3, kind="embed", prompt_token_ids=(5, 6), custom_id="x"),
    ]


def test_fewer_dimensions_are_the_first_ones_at_the_same_length() -> None:
    params = resolve(Request(line=1, kind="embed", prompt="a", dimensions=2))

    answer = pooled_answer(EMBEDDING, (), params, 3)

    assert struct.unpack("<2f", answer.embedding or b"") == pytest.approx((0.5**0.5, -(0.5**0.5)))
    longer = struct.pack("<4f", 2, 0, 0, 1)
    assert pooled_answer(longer, (), params, 3).embedding == struct.pack("<2f", 2, 0)


def test_a_frames_values_become_the_answer(tokenizer_folder: Path) -> None:
    sent: list[Intake] = []
    done: list[tuple[Generation, Answer | Failure]] = []
    generations = Generations(Tokenizer(tokenizer_folder), (0,), lambda _, intake: sent.append(intake), done.extend)
    request = Request(line=1, kind="classify", prompt="a")
    piece = Piece(RecordingOwner(), request, resolve(request), 0, b"key")

    for labels in ((), ("bad", "good")):
        generations.labels = labels
        generations.add([(piece, [5, 6, 7])], 512)
        seq_id = sent[-1].add[0].seq_id
        assert (sent[-1].add[0].max_tokens, sent[-1].add[0].score_from) == (0, -1)
        values = struct.pack("<2f", 0.25, 0.75)
        generations.on_step(StepFrame(b"", b"", [(seq_id, "stop", 0)], 0, 0, 0, 3, pooled=[(seq_id, values)]))
        generations.committed([b"key"])

    embedded, classified = (answer for _, answer in done)
    assert isinstance(embedded, Answer)
    assert (embedded.embedding, embedded.prompt_tokens) == (values, 3)
    assert isinstance(classified, Answer)
    assert classified.text == "good"
    assert unpack_classification(classified.classification or b"").probs == [0.25, 0.75]
    assert generations.num_live == 0
