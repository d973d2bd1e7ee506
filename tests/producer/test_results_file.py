import base64
import csv
import errno
import gzip
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest
import zstandard

from producer import result_table
from producer.result_line import encode_result
from producer.results_file import ResultsFile, ResultShape
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


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_suffix_compresses(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"results.jsonl{suffix}"
    for _ in range(2):
        with ResultsFile(path) as file:
            file.write(ANSWER)
            file.write(FAILURE)
        written = path.read_bytes()

    content = gzip.decompress(written) if suffix == ".gz" else zstandard.decompress(written, 1 << 20)
    assert content == encode_result(ANSWER) + encode_result(FAILURE)
    assert path.read_bytes() == written, "the same Results are the same bytes"


def awkward_results() -> list[Result]:
    texts = ['with "quotes", commas', "two\r\nlines", "a return\ralone", "", "Grüße 🐟 \x00"]
    answers = [Answer(text=text, finish_reason="stop", prompt_tokens=4, completion_tokens=2) for text in texts]
    results = [msgspec.structs.replace(ANSWER, line=line, answer=answer) for line, answer in enumerate(answers, 1)]
    embedding = msgspec.structs.replace(answers[3], embedding=struct.pack("<2f", 0.5, -0.25))
    carried = '{"user":"u","metadata":{"k":"v"},"store":false}'
    return [*results, msgspec.structs.replace(FAILURE, line=6, carried=carried), replaced(7, embedding)]


def replaced(line: int, answer: Answer) -> Result:
    return msgspec.structs.replace(ANSWER, line=line, answer=answer)


def test_tables_have_a_row_for_each_sample(tmp_path: Path) -> None:
    results = awkward_results()
    for name in ("results.csv", "results.csv.gz", "results.parquet"):
        with ResultsFile(tmp_path / name) as file:
            for result in results:
                file.write(result)

    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    table = pq.read_table(tmp_path / "results.parquet")

    assert list(rows[0]) == table.column_names
    assert gzip.decompress((tmp_path / "results.csv.gz").read_bytes()) == (tmp_path / "results.csv").read_bytes()
    expected = ["" if result.answer is None else result.answer.text for result in results]
    assert [row["text"] for row in rows] == expected
    assert [text or "" for text in table["text"].to_pylist()] == expected
    assert table["line"].to_pylist() == [1, 2, 3, 4, 5, 6, 7] == [int(row["line"]) for row in rows]
    assert (rows[0]["cached"], rows[0]["completion_tokens"], rows[0]["error_code"]) == ("true", "2", "")
    assert (rows[5]["error_code"], rows[5]["user"], rows[5]["metadata"]) == ("invalid_json", "u", '{"k":"v"}')
    assert (rows[5]["store"], rows[5]["cached"], rows[5]["completion_tokens"]) == ("false", "false", "")
    assert json.loads(rows[0]["params"])["max_tokens"] == 16
    assert json.loads(rows[6]["embedding"]) == [0.5, -0.25]
    assert table["embedding"].to_pylist() == [None] * 6 + [[0.5, -0.25]]
    assert table["error_code"].to_pylist() == [None] * 5 + ["invalid_json", None]


def test_parquet_is_written_group_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_table, "_GROUP_ROWS", 2)
    with ResultsFile(tmp_path / "results.parquet") as file:
        for result in awkward_results():
            file.write(result)

    assert pq.ParquetFile(tmp_path / "results.parquet").num_row_groups == 4


def test_table_without_results_has_its_columns(tmp_path: Path) -> None:
    for name in ("results.csv", "results.parquet"):
        with ResultsFile(tmp_path / name):
            pass

    assert (tmp_path / "results.csv").read_text().startswith("line,sample,custom_id,text,")
    assert pq.read_table(tmp_path / "results.parquet").num_rows == 0


@pytest.mark.parametrize("name", ["results.csv", "results.parquet"])
def test_openais_format_is_json_lines_alone(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="OpenAI's format is JSON lines"):
        ResultsFile(tmp_path / name, ResultShape("openai")).check()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["results.jsonl.gz", "results.csv.zst", "results.parquet"])
def test_error_leaves_nothing_of_a_compressed_file_either(name: str, tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with ResultsFile(tmp_path / name) as file:
            file.write(ANSWER)
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()

    assert os.listdir(tmp_path) == []
