"""Whether files of Results say what the ledger says: every Result once, none altered, nothing besides."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from producer.compression import DAMAGES, decompressed
from producer.file_format import format_of
from producer.result_line import encode_result
from protocol.errors import ConfigurationError
from protocol.requests import Result

#: Lines that are named; all are counted.
_MAX_NAMED = 20


class FileCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Lines are those of the Job's input. Counts are of Results, one for each sample."""

    num_rows: int
    num_missing: int  # in the ledger and not in the file
    num_altered: int  # in both, with other content
    num_surplus: int  # in the file alone, or there more than once
    lines: list[int]  # the first of those concerned

    @property
    def holds(self) -> bool:
        return not (self.num_missing or self.num_altered or self.num_surplus)


class _Key(msgspec.Struct):
    line: int
    sample: int


_decode_key = msgspec.json.Decoder(_Key).decode


def check_files(paths: Iterable[Path], results: Iterable[Result]) -> FileCheck:
    """Compare JSONL files as `millrace results` writes them, in any order, in gzip or zstd or not, with these Results,
    which the files have together: answers and errors may be apart.

    Raises ConfigurationError for a file that cannot be read or is not one.
    """
    expected = {(result.line, result.sample): _hash(encode_result(result)) for result in results}
    seen: set[tuple[int, int]] = set()
    altered: set[int] = set()
    surplus: list[int] = []
    num_rows = num_altered = 0
    for found, row in (each for path in paths for each in _rows(path)):
        num_rows += 1
        key = (found.line, found.sample)
        if key in seen or key not in expected:
            surplus.append(found.line)
        elif expected[key] != _hash(row):
            num_altered += 1
            altered.add(found.line)
        seen.add(key)
    missing = [line for line, sample in expected if (line, sample) not in seen]
    return FileCheck(
        num_rows=num_rows,
        num_missing=len(missing),
        num_altered=num_altered,
        num_surplus=len(surplus),
        lines=sorted({*missing, *altered, *surplus})[:_MAX_NAMED],
    )


def _rows(path: Path) -> Iterator[tuple[_Key, bytes]]:
    file_format = format_of(path.name)
    if file_format.kind != "jsonl":
        raise ConfigurationError(
            f"cannot verify {path}: {file_format.kind} is not compared, write the Results as JSONL"
        )
    num_rows = 0
    try:
        with path.open("rb") as file:
            for row in decompressed(file, file_format.compression):
                num_rows += 1
                yield _decode_key(row), row
    except DAMAGES as error:
        raise ConfigurationError(f"{path} is damaged behind row {num_rows}, as {file_format.compression} is") from error
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"row {num_rows} of {path} is no Result in the flat format: {error}") from error


def _hash(row: bytes) -> bytes:
    # 16 bytes: the keys of ten million Results are to fit into memory.
    return hashlib.blake2b(row.rstrip(b"\r\n"), digest_size=16).digest()
