"""Raw lines as Requests; knows no database and no queue, and holds one line at a time.

Two shapes of line are read: OpenAI's batch lines (`custom_id`, `method`, `url`, `body`) and plain ones (`prompt` or
`messages`, an optional `id` or `custom_id`, and sampling parameters beside them). Plain lines may also ask for scores:
`{"context": ..., "continuation": ...}`, or `{"kind": "score", "text": ...}` for all of a text; for an embedding,
`{"input": ...}`; or for a classification, `{"kind": "classify", "input": ...}`. A line that cannot be used becomes a
failed Result with its number, and the rest goes on.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from producer.batch_line import read_body, read_envelope
from producer.raw_lines import RawLine
from protocol.errors import InvalidRequest
from protocol.reading.fields import LineHead, read_carried, read_custom_id, type_name
from protocol.reading.plain_line import read_plain
from protocol.reading.pooled_line import POOLED_KINDS, read_pooled
from protocol.reading.score_line import read_score
from protocol.requests import Endpoint, Failure, Request, Result

#: Characters of a message in an error row: it quotes values, and a value can be as long as its line.
_MAX_MESSAGE_LENGTH = 400

_BOM = b"\xef\xbb\xbf"
_NOT_UTF8 = "the line is not valid UTF-8: save the file as UTF-8"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class LineReader:
    """Iterates over the Requests and failed Results of an input; blank lines count as lines and yield nothing.

    `model_names` are the names a line may ask for, the usual one first. The first `skip` lines are passed over unread,
    which is how an interrupted submission goes on. `num_lines` is the number of the last line taken from the input.
    """

    def __init__(self, lines: Iterable[RawLine], model_names: Sequence[str], *, skip: int = 0) -> None:
        self.num_lines = 0
        self._lines = lines
        self._model_names = model_names
        self._skip = skip

    def __iter__(self) -> Iterator[Request | Result]:
        for raw in self._lines:
            self.num_lines += 1
            if self.num_lines <= self._skip:
                continue
            text = raw.removeprefix(_BOM) if self.num_lines == 1 and isinstance(raw, bytes) else raw
            if isinstance(text, InvalidRequest) or (text and not text.isspace()):
                yield read_line(text, self.num_lines, self._model_names)


def encode_item(item: str | Mapping[str, Any]) -> bytes:
    """A Python caller's item as the line it stands for: a string is a prompt, a mapping the line's JSON object.

    Raises TypeError for what JSON cannot express.
    """
    line = {"prompt": item} if isinstance(item, str) else _spell_out(item)
    try:
        return msgspec.json.encode(line)
    except UnicodeEncodeError:
        return json.dumps(line).encode()  # the reader refuses it by what is in it


def _spell_out(value: Any) -> Any:
    """NaN and infinities as text, which the reader refuses by name; JSON would have null, which means unset."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _spell_out(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_spell_out(inner) for inner in value] if any(isinstance(inner, float) for inner in value) else value
    return value


def read_line(raw: RawLine, number: int, model_names: Sequence[str]) -> Request | Result:
    """One line as a Request, or as the failed Result that says what is wrong with it."""
    custom_id: str | None = None
    carried: str | None = None
    endpoint: Endpoint = "plain"
    try:
        if isinstance(raw, InvalidRequest):
            raise raw
        fields = _decode_object(raw)
        custom_id = read_custom_id(fields)
        body = fields.get("body", fields)
        carried = read_carried(body) if isinstance(body, dict) else None
        head = LineHead(number, custom_id, model_names, carried)
        if _asks_for_a_score(fields):
            return read_score(fields, head)
        if "body" not in fields and "url" not in fields:
            if "input" in fields or fields.get("kind") in POOLED_KINDS:
                return read_pooled(fields, head)
            return read_plain(fields, head)
        endpoint = read_envelope(fields)
        return read_body(fields.get("body"), head, endpoint)
    except InvalidRequest as error:
        message = error.message
        if len(message) > _MAX_MESSAGE_LENGTH:
            message = message[:_MAX_MESSAGE_LENGTH] + "..."
        failure = Failure(error.code, message)
        return Result(line=number, custom_id=custom_id, endpoint=endpoint, carried=carried, failure=failure)


def _asks_for_a_score(fields: Mapping[str, Any]) -> bool:
    """A context alone is one that lacks its continuation; beside a prompt it is an unknown field."""
    if "continuation" in fields or fields.get("kind") == "score":
        return True
    return "context" in fields and not fields.keys() & {"prompt", "messages", "body", "input"}


def _is_half_a_pair(raw: bytes) -> bool:
    """Whether this would be JSON but for an escaped half of a character, as Python writes what it could not decode."""
    if not _SURROGATE.search(raw):
        return False
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _decode_object(raw: bytes) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(raw)
    except UnicodeDecodeError as error:
        raise InvalidRequest("invalid_utf8", _NOT_UTF8) from error
    except msgspec.DecodeError as error:
        if _is_half_a_pair(raw):
            raise InvalidRequest("invalid_utf8", "the line has half of a surrogate pair: leave it out") from error
        if not _is_utf8(raw):
            raise InvalidRequest("invalid_utf8", _NOT_UTF8) from error
        raise InvalidRequest("invalid_json", f"the line cannot be read as JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("invalid_json", "the line's JSON is nested too deeply") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("invalid_type", f"the line is not a JSON object but {type_name(fields)}")
    return fields
