"""Whether a file of Results says what the ledger says: every Result once, none altered, nothing besides."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

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


def check_file(path: Path, results: Iterable[Result]) -> FileCheck:
    """Compare a JSONL file as `millrace results` writes it, in any order, with these Results.

    Raises ConfigurationError for a file that cannot be read or is not one.
    """
    expected = {(result.line, result.sample): _hash(encode_result(result)) for result in results}
    seen: set[tuple[int, int]] = set()
    altered: set[int] = set()
    surplus: list[int] = []
    num_rows = num_altered = 0
    try:
        with path.open("rb") as file:
            for row in file:
                found = _decode_key(row)
                num_rows += 1
                key = (found.line, found.sample)
                if key in seen or key not in expected:
                    surplus.append(found.line)
                elif expected[key] != _hash(row):
                    num_altered += 1
                    altered.add(found.line)
                seen.add(key)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"row {num_rows + 1} of {path} is no Result as JSONL: {error}") from error
    missing = [line for line, sample in expected if (line, sample) not in seen]
    return FileCheck(
        num_rows=num_rows,
        num_missing=len(missing),
        num_altered=num_altered,
        num_surplus=len(surplus),
        lines=sorted({*missing, *altered, *surplus})[:_MAX_NAMED],
    )


def _hash(row: bytes) -> bytes:
    # 16 bytes: the keys of ten million Results are to fit into memory.
    return hashlib.blake2b(row.rstrip(b"\r\n"), digest_size=16).digest()
