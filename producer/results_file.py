"""ResultsFile: a Job's Results as JSONL, one object per sample in the order of the input; all of them or no file.

Every object has the same keys: `line` and `sample` say which, `custom_id` is the caller's; `text`, `finish_reason` and
`usage` are null in an error, `error` is null in an answer; `cached` says that nothing was computed for it; `params` are
the resolved parameters, null when the line was refused before they were known. `logprobs` is there only where they were
asked for, in OpenAI's shape. `score` is there for lines of kind score and for prompt_logprobs: protocol.scores.Score.
`embedding` is there for lines of kind embed: numbers, or base64 where that was asked for; `classification` for lines of
kind classify, whose `text` is the label: protocol.pooling.Classification. `user`, `metadata` and `store` are there for
lines that have them.
"""

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from protocol.errors import ConfigurationError
from protocol.logprobs import Logprobs, unpack_logprobs
from protocol.pooling import Classification, show_embedding, unpack_classification
from protocol.requests import Failure, Result
from protocol.sampling import ResolvedParams
from protocol.scores import Score, unpack_score


class Usage(msgspec.Struct, frozen=True):
    """Tokens, as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: int


class ResultLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the file; the fields' order is the keys' order."""

    line: int
    sample: int
    custom_id: str | None
    text: str | None
    finish_reason: str | None
    usage: Usage | None
    cached: bool
    error: Failure | None
    params: ResolvedParams | None
    logprobs: Logprobs | msgspec.UnsetType = msgspec.UNSET
    score: Score | msgspec.UnsetType = msgspec.UNSET
    embedding: list[float] | str | msgspec.UnsetType = msgspec.UNSET
    classification: Classification | msgspec.UnsetType = msgspec.UNSET
    user: str | msgspec.UnsetType = msgspec.UNSET
    metadata: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    store: bool | msgspec.UnsetType = msgspec.UNSET


_encode = msgspec.json.Encoder().encode


def encode_result(result: Result) -> bytes:
    """The Result's line, line break included."""
    answer = result.answer
    line = ResultLine(
        line=result.line,
        sample=result.sample,
        custom_id=result.custom_id,
        text=None if answer is None else answer.text,
        finish_reason=None if answer is None else answer.finish_reason,
        usage=None if answer is None else Usage(answer.prompt_tokens, answer.completion_tokens),
        cached=result.is_cached,
        error=result.failure,
        params=result.params,
        logprobs=msgspec.UNSET if answer is None or answer.logprobs is None else unpack_logprobs(answer.logprobs),
        score=msgspec.UNSET if answer is None or answer.score is None else unpack_score(answer.score),
        embedding=_embedding(result),
        classification=msgspec.UNSET
        if answer is None or answer.classification is None
        else unpack_classification(answer.classification),
        **({} if result.carried is None else msgspec.json.decode(result.carried)),
    )
    return _encode(line) + b"\n"


def _embedding(result: Result) -> list[float] | str | msgspec.UnsetType:
    if result.answer is None or result.answer.embedding is None:
        return msgspec.UNSET
    is_base64 = result.params is not None and result.params.encoding_format == "base64"
    return show_embedding(result.answer.embedding, "base64" if is_base64 else "float")


class ResultsFile:
    """A context manager: what is written within appears under `path` at once at the end, or, after an error, not.

    Creates the folder. Raises ConfigurationError when the file cannot be written, as far as that can be known on
    entering.
    """

    def __init__(self, path: Path) -> None:
        # A link stays a link: its target is what is replaced.
        self._path = Path(os.path.realpath(path))
        self._temporary: Path | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> "ResultsFile":
        try:
            if self._path.is_dir():
                raise ConfigurationError(f"cannot write the results to {self._path}: it is a folder, name a file in it")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and not stat.S_ISREG(self._path.stat().st_mode):
                self._file = self._path.open("wb")  # a pipe or a device cannot be replaced
                return self
            # Beside the target, since a rename works only within one file system.
            handle, name = tempfile.mkstemp(prefix=f".{self._path.name}.", suffix=".tmp", dir=self._path.parent)
            self._temporary, self._file = Path(name), os.fdopen(handle, "wb")
            self._temporary.chmod(0o666 & ~_umask())
        except OSError as error:
            raise self._trouble(error) from error
        return self

    def check(self) -> None:
        """Raises ConfigurationError when the file could not be written: to be asked before hours of work."""
        if not self._path.exists() or self._path.is_dir() or self._path.is_file():
            self.__enter__()
            self._discard()

    def write(self, result: Result) -> None:
        """Add one Result. Raises ConfigurationError when it cannot be written, as on a full disk."""
        assert self._file is not None
        try:
            self._file.write(encode_result(result))
        except OSError as error:
            raise self._trouble(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if error is None:
                self._complete(self._file)
        except OSError as trouble:
            raise self._trouble(trouble) from trouble
        finally:
            self._discard()

    def _trouble(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(f"cannot write the results to {self._path}: {error.strerror}")

    def _discard(self) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):
            self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None

    def _complete(self, file: BinaryIO) -> None:
        file.flush()
        if self._temporary is None:
            return
        os.fsync(file.fileno())
        os.replace(self._temporary, self._path)
        self._temporary = None
        # The rename itself is on disk only when the folder is.
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    # It can only be read by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
