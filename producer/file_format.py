"""FileFormat: what a file's lines are written as and how it is compressed, told by the suffixes of its name."""

from dataclasses import dataclass
from typing import Literal

from protocol.errors import ConfigurationError

FileKind = Literal["jsonl", "csv", "parquet"]
Compression = Literal["gzip", "zstd"]

_KINDS: dict[str, FileKind] = {"jsonl": "jsonl", "ndjson": "jsonl", "csv": "csv", "parquet": "parquet"}
_COMPRESSIONS: dict[str, Compression] = {"gz": "gzip", "zst": "zstd"}
#: All that can be asked for by name.
FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "csv.zst", "parquet")


@dataclass(frozen=True, slots=True)
class FileFormat:
    """A Parquet file is never compressed as a whole: its columns are."""

    kind: FileKind = "jsonl"
    compression: Compression | None = None


def format_of(name: str) -> FileFormat:
    """Of a file's name, or of a format's; JSON lines where it says nothing.

    Raises ConfigurationError for a Parquet file in gzip or zstd.
    """
    parts = name.lower().rsplit("/", 1)[-1].split(".")
    compression = _COMPRESSIONS.get(parts[-1])
    if compression is not None:
        parts.pop()
    kind = _KINDS.get(parts[-1], "jsonl") if parts else "jsonl"
    if kind == "parquet" and compression is not None:
        raise ConfigurationError(f"{name}: a Parquet file compresses its own columns, so leave {compression} away")
    return FileFormat(kind, compression)
