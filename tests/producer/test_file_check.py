"""Files of Results against the Results themselves, in every format that they are written in."""

from pathlib import Path

import msgspec
import pytest

from producer.file_check import FileCheck, check_files
from producer.results_file import ResultsFile
from protocol.errors import ConfigurationError
from protocol.requests import Result
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
    assert check_files([write(tmp_path / name, *reversed(results))], results) == FileCheck(
        num_rows=7, num_missing=0, num_altered=0, num_surplus=0, lines=[]
    )

    wrong = write(tmp_path / name, altered(results[0]), *results[2:], results[6])
    assert check_files([wrong], results) == FileCheck(
        num_rows=7, num_missing=1, num_altered=1, num_surplus=1, lines=[1, 2, 7]
    )


def test_answers_and_errors_may_be_apart_in_files_of_different_kinds(tmp_path: Path) -> None:
    results = awkward_results()
    answers = write(tmp_path / "answers.csv", *(result for result in results if result.failure is None))
    errors = write(tmp_path / "errors.parquet", *(result for result in results if result.failure is not None))

    assert check_files([answers, errors], results).holds
    assert check_files([answers], results).lines == [6]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"id": "batch_req-1"}\n', "files of --format openai are not compared"),
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
        check_files([tmp_path / name], awkward_results())
