"""What makes two submissions the same Job: equal input, equal parameters, equal model."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from protocol.errors import ConfigurationError
from protocol.sampling import SamplingParams

#: Raised when the same input would be cut into other Requests than before.
_VERSION = 1

_encode = msgspec.msgpack.Encoder().encode


def job_identity(content_digest: str, params: SamplingParams, model: str) -> str:
    """64 hex digits."""
    return hashlib.sha256(_encode([_VERSION, content_digest, params, model])).hexdigest()


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
