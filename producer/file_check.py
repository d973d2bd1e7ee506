"""Whether files of Results say what the ledger says: every Result once, none altered, nothing besides."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from producer.batch_result import encode_batch_result
from producer.compression import DAMAGES, decompressed
from producer.file_format import FileKind, format_of
from producer.line_results import whole_lines
from producer.results_file import ResultFormat
from producer.written_batch import is_batch_object, shown_models, written_objects
from producer.written_results import WrittenRow, content_of, written_rows
from protocol.errors import ConfigurationError
from protocol.requests import Result
from storage.jobs import Job

T = TypeVar("T")

#: Lines that are named; all are counted.
_MAX_NAMED = 20


class FileCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Lines are those of the Job's input. Counts are of rows: Results, one for each sample, or in OpenAI's format one
    for each line."""

    format: ResultFormat = "flat"
    num_rows: int
    num_missing: int  # in the ledger and not in the file
    num_altered: int  # in both, with other content
    num_surplus: int  # in the file alone, or there more than once
    lines: list[int]  # the first of those concerned

    @property
    def holds(self) -> bool:
        return not (self.num_missing or self.num_altered or self.num_surplus)


def check_files(paths: Sequence[Path], results: Iterable[Result], job: Job) -> FileCheck:
    """Compare files as `millrace results` writes them, in any order of rows, with these Results, which the files have
    together: answers and errors may be apart. All are in the flat format, or all in OpenAI's.

    Raises ConfigurationError for a file that cannot be read or is not one.
    """
    files = [_File(path) for path in paths]
    is_batch = any(file.is_batch for file in files)
    if is_batch and (flat := next((file for file in files if not (file.is_batch or file.is_empty)), None)):
        raise ConfigurationError(f"{flat} is not in OpenAI's format as the others are: verify each format by itself")
    expected: dict[FileKind, dict[tuple[int, int], bytes]] = {file.kind: {} for file in files}
    if is_batch:
        model = next((model for file in files if (model := file.model()) is not None), job.model)
        for line in whole_lines(results, is_in_order=True):
            content = encode_batch_result(line, job, model).rstrip(b"\n")
            expected["jsonl"][line[0].line, 0] = _hash(content)
    else:
        for result in results:
            for kind, hashes in expected.items():
                hashes[result.line, result.sample] = _hash(content_of(result, kind))
    seen: set[tuple[int, int]] = set()
    altered: set[int] = set()
    surplus: list[int] = []
    num_rows = num_altered = 0
    for file in files:
        for row in file.rows(job.id if is_batch else None):
            num_rows += 1
            key = (row.line, row.sample)
            if key in seen or key not in expected[file.kind]:
                surplus.append(row.line)
            elif expected[file.kind][key] != _hash(row.content):
                num_altered += 1
                altered.add(row.line)
            seen.add(key)
    missing = [line for line, sample in expected[files[0].kind] if (line, sample) not in seen]
    return FileCheck(
        format="openai" if is_batch else "flat",
        num_rows=num_rows,
        num_missing=len(missing),
        num_altered=num_altered,
        num_surplus=len(surplus),
        lines=sorted({*missing, *altered, *surplus})[:_MAX_NAMED],
    )


class _File:
    """One of them. Everything raises ConfigurationError with its name and the row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._format = format_of(path.name)
        self.kind = self._format.kind
        if path.exists() and not path.is_file():
            raise ConfigurationError(f"cannot verify {self}: it is no file that can be read twice, so make it one")
        first = b"" if self.kind != "jsonl" else next(self._read(iter), b"")
        self.is_empty = self.kind == "jsonl" and not first
        self.is_batch = bool(first) and is_batch_object(first)

    def __str__(self) -> str:
        return str(self._path)

    def model(self) -> str | None:
        """How OpenAI's objects in it call the model; None when none does."""
        return next((model for model in self._read(shown_models) if model is not None), None)

    def rows(self, batch_of: str | None) -> Iterator[WrittenRow]:
        """Those of OpenAI's batch output of this Job, or of the flat format."""
        if batch_of is None:
            return self._read(lambda file: written_rows(file, self.kind))
        return self._read(lambda file: written_objects(file, batch_of))

    def _read(self, parse: Callable[[BinaryIO], Iterator[T]]) -> Iterator[T]:
        num_rows = 0
        try:
            with self._path.open("rb") as file:
                for row in parse(decompressed(file, self._format.compression)):
                    num_rows += 1
                    yield row
        except DAMAGES as error:
            raise ConfigurationError(
                f"{self} is damaged behind row {num_rows}, read as {self._format.compression}: write it anew"
            ) from error
        except OSError as error:
            raise ConfigurationError(f"cannot read {self}: {error.strerror or error}") from error
        except ConfigurationError as error:
            raise ConfigurationError(f"cannot verify {self}, row {num_rows + 1}: {error}") from error


def _hash(content: bytes) -> bytes:
    # 16 bytes: the keys of ten million Results are to fit into memory.
    return hashlib.blake2b(content, digest_size=16).digest()
