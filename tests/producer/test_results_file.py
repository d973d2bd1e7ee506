import base64
import errno
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from producer.result_line import encode_result
from producer.results_file import ResultsFile
from protocol.errors import ConfigurationError
from protocol.logprobs import pack_logprobs, unpack_logprobs
from protocol.pooling import pack_classification
from protocol.requests import Answer, Failure, Result
from protocol.sampling import SamplingParams, resolve

ANSWER = Result(
    line=3,
    sample=1,
    custom_id="a",
    answer=Answer(text="Grüße\n", finish_reason="stop", prompt_tokens=4, completion_tokens=2),
    is_cached=True,
    params=resolve(SamplingParams(temperature=0), max_tokens=16),
)
FAILURE = Result(line=4, failure=Failure("invalid_json", "no"))


def test_answer_is_written_with_every_key_in_order() -> None:
    assert encode_result(ANSWER).decode() == (
        '{"line":3,"sample":1,"custom_id":"a","text":"Grüße\\n","finish_reason":"stop",'
        '"usage":{"prompt_tokens":4,"completion_tokens":2},"cached":true,"error":null,'
        '"params":{"max_tokens":16,"temperature":0.0,"top_p":1.0,"top_k":0,"seed":null,"n":1,"stop":[],'
        '"ignore_eos":false,"min_p":0.0,"repetition_penalty":1.0,"presence_penalty":0.0,"frequency_penalty":0.0,'
        '"logit_bias":{},"min_tokens":0,"stop_token_ids":[],"logprobs":null,"prompt_logprobs":null}}\n'
    )


def test_embeddings_are_written_as_they_were_asked_for() -> None:
    embedding = struct.pack("<3f", 0.5, -0.25, 0.0)
    answer = Answer(text="", finish_reason="stop", prompt_tokens=4, completion_tokens=0, embedding=embedding)
    assert ANSWER.params is not None
    as_numbers = msgspec.structs.replace(ANSWER, answer=answer)
    params = msgspec.structs.replace(ANSWER.params, encoding_format="base64", dimensions=3)
    as_base64 = msgspec.structs.replace(as_numbers, params=params)

    assert json.loads(encode_result(as_numbers))["embedding"] == [0.5, -0.25, 0.0]
    assert "dimensions" not in json.loads(encode_result(as_numbers))["params"]
    written = json.loads(encode_result(as_base64))
    assert base64.b64decode(written["embedding"]) == embedding
    assert written["params"]["dimensions"] == 3


def test_classifications_are_written_with_their_labels() -> None:
    packed = pack_classification(["bad", "good"], struct.pack("<2f", 0.25, 0.75))
    answer = Answer(text="good", finish_reason="stop", prompt_tokens=4, completion_tokens=0, classification=packed)

    written = json.loads(encode_result(msgspec.structs.replace(ANSWER, answer=answer)))

    assert written["text"] == "good"
    assert written["classification"] == {"label": "good", "probs": [0.25, 0.75], "labels": ["bad", "good"]}


def test_log_probabilities_are_written_where_they_were_asked_for() -> None:
    texts = {7: " né".encode(), 8: b"\xc3", 9: b"b"}
    pieces = [
        struct.pack("<f2i2f", -0.5, 7, 9, -0.5, -1.5),
        struct.pack("<f2i2f", -2.0, 9, 7, -0.25, -math.inf),
    ]
    blob = pack_logprobs([7, 8], pieces, texts.__getitem__)
    assert ANSWER.answer is not None
    answer = msgspec.structs.replace(ANSWER.answer, logprobs=blob)

    written = json.loads(encode_result(msgspec.structs.replace(ANSWER, answer=answer)))

    first = {"token": " né", "logprob": -0.5, "bytes": [32, 110, 195, 169]}
    assert written["logprobs"] == {
        "content": [
            {**first, "top_logprobs": [first, {"token": "b", "logprob": -1.5, "bytes": [98]}]},
            {
                "token": "\ufffd",
                "logprob": -2.0,
                "bytes": [195],
                "top_logprobs": [{"token": "b", "logprob": -0.25, "bytes": [98]}, {**first, "logprob": -9999.0}],
            },
        ]
    }


def test_no_alternatives_are_an_empty_list() -> None:
    blob = pack_logprobs([7], [struct.pack("<f", -0.5)], lambda _: b"x")

    assert msgspec.to_builtins(unpack_logprobs(blob)) == {
        "content": [{"token": "x", "logprob": -0.5, "bytes": [120], "top_logprobs": []}]
    }
    assert unpack_logprobs(pack_logprobs([], [], lambda _: b"x")).content == []


def test_what_the_line_carries_stands_at_the_end() -> None:
    carried = msgspec.structs.replace(FAILURE, carried='{"user":"u","metadata":{"k":"v"},"store":false}')

    written = json.loads(encode_result(carried))

    assert dict(list(written.items())[-3:]) == {"user": "u", "metadata": {"k": "v"}, "store": False}


def test_failure_has_the_same_keys() -> None:
    written = json.loads(encode_result(FAILURE))

    assert list(written) == list(json.loads(encode_result(ANSWER)))
    assert written["error"] == {"code": "invalid_json", "message": "no"}
    assert (written["text"], written["usage"], written["params"]) == (None, None, None)


def test_file_appears_whole_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.jsonl"

    with ResultsFile(path) as file:
        file.write(ANSWER)
        file.write(FAILURE)
        assert not path.exists()

    assert path.read_bytes() == encode_result(ANSWER) + encode_result(FAILURE)
    assert os.listdir(path.parent) == ["results.jsonl"]


def test_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    with ResultsFile(tmp_path / "results.jsonl"):
        pass
    (tmp_path / "other").write_text("")

    assert (tmp_path / "results.jsonl").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("old")

    def write_and_fail() -> None:
        with ResultsFile(path) as file:
            file.write(ANSWER)
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()

    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.jsonl"]


def test_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")

    with ResultsFile(tmp_path / "link") as file:
        file.write(FAILURE)

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == encode_result(FAILURE)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield path, reader
    os.close(reader)


def test_pipe_is_written_to_and_not_replaced(pipe: tuple[Path, int]) -> None:
    path, reader = pipe

    with ResultsFile(path) as file:
        file.write(FAILURE)

    assert os.read(reader, 4096) == encode_result(FAILURE)
    assert path.is_fifo()


def test_folder_as_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="it is a folder"), ResultsFile(tmp_path):
        pass


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigurationError, match="cannot write the results"), ResultsFile(tmp_path / "file" / "out"):
        pass


def test_check_finds_what_cannot_be_written_and_leaves_nothing(tmp_path: Path, pipe: tuple[Path, int]) -> None:
    with pytest.raises(ConfigurationError, match="it is a folder"):
        ResultsFile(tmp_path).check()
    ResultsFile(pipe[0]).check()

    ResultsFile(tmp_path / "out" / "results.jsonl").check()

    assert os.listdir(tmp_path / "out") == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_full_disk_in_the_middle_is_reported() -> None:
    def write() -> None:
        with ResultsFile(Path("/dev/full")) as file:
            for _ in range(10_000):
                file.write(ANSWER)

    with pytest.raises(ConfigurationError, match="cannot write the results to /dev/full: No space left on device"):
        write()


def test_full_disk_at_the_end_is_reported_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(ConfigurationError, match="No space left"), ResultsFile(tmp_path / "results.jsonl") as file:
        file.write(ANSWER)

    assert os.listdir(tmp_path) == []
