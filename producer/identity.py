"""What makes two submissions the same Job: equal input, equal parameters, equal model."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from producer.columns import Columns
from producer.file_format import FileFormat
from protocol.errors import ConfigurationError
from protocol.sampling import SamplingParams
from storage.jobs import Job

#: Raised when the same input would be cut into other Requests than before.
_VERSION = 1

_encode = msgspec.msgpack.Encoder().encode


#: What `job_identity` gives.
_DIGEST = re.compile(r"[0-9a-f]{64}")


def job_identity(content_digest: str, params: SamplingParams, model: str) -> str:
    """64 hex digits."""
    return hashlib.sha256(_encode([_VERSION, content_digest, params, model])).hexdigest()


def given_name(job: Job) -> str:
    """What the Job was named; nothing for one that is known by its content, whose digest says nothing to a reader."""
    return "" if _DIGEST.fullmatch(job.identity) else job.identity


def file_digest(path: Path) -> str:
    """SHA-256 of the file's bytes. Raises ConfigurationError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigurationError(f"cannot read the input {path}: {error.strerror}") from error


def lines_digest(lines: Iterable[bytes]) -> str:
    """SHA-256 of the file these lines, which have no line breaks, would make."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line)
        total.update(b"\n")
    return total.hexdigest()


def reading_digest(content_digest: str, file_format: FileFormat, columns: Columns, model_map: Mapping[str, str]) -> str:
    """SHA-256 of a content and of how it is read: other columns, another kind or other models make another input."""
    if file_format.kind == "jsonl" and not model_map:
        return content_digest
    reading = [file_format.kind, columns.prompt, columns.id, columns.kind, sorted(model_map.items())]
    return hashlib.sha256(_encode([content_digest, reading])).hexdigest()
