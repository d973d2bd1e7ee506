"""Files of Results against the Results themselves, in every format that they are written in."""

import os
from pathlib import Path

import msgspec
import pytest

from producer.file_check import FileCheck, check_files
from producer.results_file import ResultsFile, ResultShape
from protocol.errors import ConfigurationError
from protocol.requests import Failure, Result
from storage.jobs import Job
from tests.producer.test_batch_result import JOB, answered
from tests.producer.test_results_file import awkward_results

NAMES = ("r.jsonl", "r.jsonl.gz", "r.csv", "r.csv.zst", "r.parquet")


def write(path: Path, *results: Result) -> Path:
    with ResultsFile(path) as file:
        for result in results:
            file.write(result)
    return path


def altered(result: Result) -> Result:
    assert result.answer is not None
    return msgspec.structs.replace(result, answer=msgspec.structs.replace(result.answer, text="another"))


@pytest.mark.parametrize("name", NAMES)
def test_file_holds_what_was_written_and_what_is_wrong_with_another_is_named(name: str, tmp_path: Path) -> None:
    results = awkward_results()
    assert check_files([write(tmp_path / name, *reversed(results))], results, JOB) == FileCheck(
        num_rows=7, num_missing=0, num_altered=0, num_surplus=0, lines=[]
    )

    wrong = write(tmp_path / name, altered(results[0]), *results[2:], results[6])
    assert check_files([wrong], results, JOB) == FileCheck(
        num_rows=7, num_missing=1, num_altered=1, num_surplus=1, lines=[1, 2, 7]
    )


def test_answers_and_errors_may_be_apart_in_files_of_different_kinds(tmp_path: Path) -> None:
    results = awkward_results()
    answers = write(tmp_path / "answers.csv", *(result for result in results if result.failure is None))
    errors = write(tmp_path / "errors.parquet", *(result for result in results if result.failure is not None))

    assert check_files([answers, errors], results, JOB).holds
    assert check_files([answers], results, JOB).lines == [6]


def batch(path: Path, *lines: list[Result], job: Job = JOB, model: str = "shown") -> Path:
    with ResultsFile(path, ResultShape("openai", job, model)) as file:
        for results in lines:
            file.write(*results)
    return path


LINES = [
    [Result(line=1, failure=Failure("invalid_json", "no JSON"))],
    [answered(2, 0), answered(2, 1)],
    [answered(5, 0), answered(5, 1)],
]


def test_openais_objects_hold_each_line_once_however_they_call_the_model(tmp_path: Path) -> None:
    results = [result for line in LINES for result in line]
    whole = batch(tmp_path / "r.jsonl", *reversed(LINES))
    assert check_files([whole], results, JOB) == FileCheck(
        format="openai", num_rows=3, num_missing=0, num_altered=0, num_surplus=0, lines=[]
    )

    answers, errors = batch(tmp_path / "a.jsonl.gz", *LINES[1:]), batch(tmp_path / "e.jsonl", *LINES[:1])
    nothing = write(tmp_path / "nothing.jsonl")
    assert check_files([errors, nothing, answers], results, JOB).holds

    wrong = batch(tmp_path / "w.jsonl", [answered(2, 0), altered(answered(2, 1))], LINES[0], LINES[0])
    assert check_files([wrong], results, JOB) == FileCheck(
        format="openai", num_rows=3, num_missing=1, num_altered=1, num_surplus=1, lines=[1, 2, 5]
    )
    renamed = batch(tmp_path / "n.jsonl", LINES[2], model="another")
    assert check_files([batch(tmp_path / "m.jsonl", *LINES[:2]), renamed], results, JOB).lines == [5]


def test_openais_objects_of_another_job_or_beside_flat_results_are_refused(tmp_path: Path) -> None:
    other = msgspec.structs.replace(JOB, id="f" * 16)
    foreign = batch(tmp_path / "foreign.jsonl", LINES[1], job=other)
    with pytest.raises(ConfigurationError, match=f"row 1: its id is 'batch_req-{'f' * 16}-2', .* none of the Job 0123"):
        check_files([foreign], LINES[1], JOB)

    flat, objects = write(tmp_path / "flat.csv", *LINES[1]), batch(tmp_path / "objects.jsonl", LINES[2])
    with pytest.raises(ConfigurationError, match=r"flat\.csv is not in OpenAI's format as the others are"):
        check_files([objects, flat], [*LINES[1], *LINES[2]], JOB)

    (tmp_path / "mixed.jsonl").write_bytes(objects.read_bytes() + write(tmp_path / "f.jsonl", *LINES[1]).read_bytes())
    with pytest.raises(ConfigurationError, match=r"mixed\.jsonl, row 2: it is no object of OpenAI's batch output"):
        check_files([tmp_path / "mixed.jsonl"], LINES[2], JOB)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"id": "batch_req-1"}\n', "row 1: it is no Result, neither in the flat format nor in OpenAI's"),
        ("r.csv", b"line,sample\n1,0\n", "its columns are not those of Results, line, sample, custom_id"),
        ("r.csv", b"\xff\n", "not well-formed CSV"),
        ("r.csv", b"", "its columns are not those"),
        ("r.parquet", b"PAR1", "no whole Parquet file"),
        ("r.csv.gz", b"nothing", "is damaged behind row 0, read as gzip: write it anew"),
    ],
)
def test_what_is_no_file_of_results_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        check_files([tmp_path / name], awkward_results(), JOB)


def test_a_pipe_is_refused_since_it_is_read_twice(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ConfigurationError, match="no file that can be read twice"):
        check_files([tmp_path / "pipe.jsonl"], awkward_results(), JOB)
