"""Whether files of Results say what the ledger says: every Result once, none altered, nothing besides."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from producer.compression import DAMAGES, decompressed
from producer.file_format import FileFormat, FileKind, format_of
from producer.written_results import WrittenRow, content_of, written_rows
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


def check_files(paths: Sequence[Path], results: Iterable[Result]) -> FileCheck:
    """Compare files as `millrace results` writes them in its flat format, in any order, with these Results, which the
    files have together: answers and errors may be apart.

    Raises ConfigurationError for a file that cannot be read or is not one.
    """
    formats = [format_of(path.name) for path in paths]
    expected: dict[FileKind, dict[tuple[int, int], bytes]] = {each.kind: {} for each in formats}
    for result in results:
        for kind, hashes in expected.items():
            hashes[result.line, result.sample] = _hash(content_of(result, kind))
    seen: set[tuple[int, int]] = set()
    altered: set[int] = set()
    surplus: list[int] = []
    num_rows = num_altered = 0
    for path, file_format in zip(paths, formats, strict=True):
        for row in _rows(path, file_format):
            num_rows += 1
            key = (row.line, row.sample)
            if key in seen or key not in expected[file_format.kind]:
                surplus.append(row.line)
            elif expected[file_format.kind][key] != _hash(row.content):
                num_altered += 1
                altered.add(row.line)
            seen.add(key)
    missing = [line for line, sample in expected[formats[0].kind] if (line, sample) not in seen]
    return FileCheck(
        num_rows=num_rows,
        num_missing=len(missing),
        num_altered=num_altered,
        num_surplus=len(surplus),
        lines=sorted({*missing, *altered, *surplus})[:_MAX_NAMED],
    )


def _rows(path: Path, file_format: FileFormat) -> Iterator[WrittenRow]:
    num_rows = 0
    try:
        with path.open("rb") as file:
            for row in written_rows(decompressed(file, file_format.compression), file_format.kind):
                num_rows += 1
                yield row
    except DAMAGES as error:
        raise ConfigurationError(
            f"{path} is damaged behind row {num_rows}, read as {file_format.compression}: write it anew"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror or error}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"cannot verify {path}, row {num_rows + 1}: {error}") from error


def _hash(content: bytes) -> bytes:
    # 16 bytes: the keys of ten million Results are to fit into memory.
    return hashlib.blake2b(content, digest_size=16).digest()
