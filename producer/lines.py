"""JSONL input as a stream of Requests; knows no database and no queue, and holds one line at a time.

Two shapes of line are read: OpenAI's batch lines (`custom_id`, `method`, `url`, `body`) and plain ones (`prompt` or
`messages`, an optional `id` or `custom_id`, and sampling parameters beside them). Plain lines may also ask for scores:
`{"context": ..., "continuation": ...}`, or `{"kind": "score", "text": ...}` for all of a text; for an embedding,
`{"input": ...}`; or for a classification, `{"kind": "classify", "input": ...}`. A line that cannot be used becomes a
failed Result with its number, and the rest goes on.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, get_args

import msgspec

from protocol.errors import InvalidRequest
from protocol.requests import EncodingFormat, Endpoint, Failure, Kind, Message, Request, Result
from protocol.sampling import MAX_LOGPROBS, MAX_TOKEN_COUNT, SamplingParams

#: A longer line is refused without being read whole: it is a file without line breaks more often than a prompt.
MAX_LINE_BYTES = 16 * 1024 * 1024
#: Characters; OpenAI's own are at most 64, and every Result row carries one.
MAX_CUSTOM_ID_LENGTH = 512
#: Characters of a message in an error row: it quotes values, and a value can be as long as its line.
_MAX_MESSAGE_LENGTH = 400

_BOM = b"\xef\xbb\xbf"
_PARAMETERS = frozenset(SamplingParams.__struct_fields__)
_BATCH_FIELDS = frozenset({"custom_id", "method", "url", "body"})
_PLAIN_FIELDS = frozenset({"id", "custom_id", "model", "prompt", "messages", "kind"})
#: `kind` may be left out beside a continuation.
_SCORE_FIELDS = frozenset({"id", "custom_id", "model", "kind", "context", "continuation", "text"})
#: The one parameter that means something for a score: how many alternatives are told with each token.
_SCORE_PARAMETER = "prompt_logprobs"
_CONTENT_FIELD: dict[Endpoint, str] = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/embeddings": "input",
    "/classify": "input",
}
_POOLED_KIND: dict[Endpoint, Kind] = {"/v1/embeddings": "embed", "/classify": "classify"}
#: `kind` may be left out for an embedding.
_POOLED_FIELDS = frozenset({"id", "custom_id", "kind"})
_EMBED_FIELDS = frozenset({"dimensions", "encoding_format"})
#: Inputs of one line, as at OpenAI: more are better expressed as more lines, which spread over Chunks.
MAX_INPUTS = 2048
#: Told to OpenAI about the caller, not about the answer.
_IGNORED_FIELDS = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"})
#: OpenAI's and vLLM's parameters that are not supported, with the values that ask for nothing and so may stay.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class LineReader:
    """Iterates over the Requests and failed Results of an input; blank lines count as lines and yield nothing.

    `model_names` are the names a line may ask for, the usual one first. The first `skip` lines are passed over unread,
    which is how an interrupted submission goes on. `num_lines` is the number of the last line taken from the input.
    """

    def __init__(self, lines: Iterable[bytes], model_names: Sequence[str], *, skip: int = 0) -> None:
        self.num_lines = 0
        self._lines = lines
        self._model_names = model_names
        self._skip = skip

    def __iter__(self) -> Iterator[Request | Result]:
        for raw in self._lines:
            self.num_lines += 1
            if self.num_lines <= self._skip:
                continue
            text = raw.removeprefix(_BOM) if self.num_lines == 1 else raw
            if text and not text.isspace():
                yield read_line(text, self.num_lines, self._model_names)


def split_lines(file: BinaryIO) -> Iterator[bytes]:
    """The file's lines; of one over MAX_LINE_BYTES only as much as shows that it is too long."""
    while raw := file.readline(MAX_LINE_BYTES + 1):
        yield raw
        rest = raw
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)


def encode_item(item: str | Mapping[str, Any]) -> bytes:
    """A Python caller's item as the line it stands for: a string is a prompt, a mapping the line's JSON object.

    Raises TypeError for what JSON cannot express.
    """
    return msgspec.json.encode({"prompt": item} if isinstance(item, str) else _spell_out(item))


def _spell_out(value: Any) -> Any:
    """NaN and infinities as text, which the reader refuses by name; JSON would have null, which means unset."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _spell_out(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_spell_out(inner) for inner in value] if any(isinstance(inner, float) for inner in value) else value
    return value


def read_line(raw: bytes, number: int, model_names: Sequence[str]) -> Request | Result:
    """One line as a Request, or as the failed Result that says what is wrong with it."""
    custom_id: str | None = None
    endpoint: Endpoint = "plain"
    try:
        fields = _decode_object(raw)
        custom_id = _custom_id(fields)
        if "continuation" in fields or fields.get("kind") == "score":
            return _read_score(fields, number, custom_id, model_names)
        if "body" not in fields and "url" not in fields:
            if "input" in fields or fields.get("kind") in _POOLED_KIND.values():
                return _read_pooled(fields, number, custom_id, "plain", model_names)
            return _read_plain(fields, number, custom_id, model_names)
        endpoint = _read_envelope(fields)
        return _read_body(fields.get("body"), number, custom_id, endpoint, model_names)
    except InvalidRequest as error:
        message = error.message
        if len(message) > _MAX_MESSAGE_LENGTH:
            message = message[:_MAX_MESSAGE_LENGTH] + "..."
        return Result(line=number, custom_id=custom_id, endpoint=endpoint, failure=Failure(error.code, message))


def _decode_object(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise InvalidRequest("line_too_long", f"the line is over the limit of {MAX_LINE_BYTES} bytes")
    try:
        fields = msgspec.json.decode(raw)
    except UnicodeDecodeError as error:
        raise InvalidRequest("invalid_utf8", "the line is not valid UTF-8: save the file as UTF-8") from error
    except msgspec.DecodeError as error:
        raise InvalidRequest("invalid_json", f"the line cannot be read as JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("invalid_json", "the line's JSON is nested too deeply") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("invalid_type", f"the line is not a JSON object but {_type_name(fields)}")
    return fields


def _custom_id(fields: dict[str, Any]) -> str | None:
    given = fields.get("custom_id")
    if given is None:
        given = fields.get("id")
        if isinstance(given, int) and not isinstance(given, bool):
            given = str(given)
    elif fields.get("id") is not None:
        raise InvalidRequest("invalid_parameter", "id and custom_id are the same thing: give one of them")
    if given is None:
        return None
    if not isinstance(given, str):
        raise InvalidRequest("invalid_type", f"custom_id must be a string, not {_type_name(given)}")
    if len(given) > MAX_CUSTOM_ID_LENGTH:
        limit = f"at most {MAX_CUSTOM_ID_LENGTH} characters"
        raise InvalidRequest("invalid_parameter", f"custom_id has {len(given)} characters: it may have {limit}")
    return given


def _read_envelope(fields: dict[str, Any]) -> Endpoint:
    for name in fields:
        if name not in _BATCH_FIELDS:
            raise InvalidRequest("unknown_field", f"{name!r} is not a field of a batch line")
    url, method = fields.get("url"), fields.get("method", "POST")
    if url is None:
        raise InvalidRequest("missing_field", f"a batch line needs url: one of {', '.join(_CONTENT_FIELD)}")
    if method != "POST":
        raise InvalidRequest("unsupported_url", f"method {method!r} is not supported: it must be POST")
    for endpoint in _CONTENT_FIELD:
        if url == endpoint:
            return endpoint
    raise InvalidRequest("unsupported_url", f"url {url!r} is not supported: use one of {', '.join(_CONTENT_FIELD)}")


def _read_plain(fields: dict[str, Any], number: int, custom_id: str | None, model_names: Sequence[str]) -> Request:
    for name in fields:
        if name not in _PLAIN_FIELDS and name not in _PARAMETERS and name != "top_logprobs":
            _refuse_field(name)
    if fields.get("kind") not in (None, "generate"):
        raise InvalidRequest(
            "invalid_parameter", f"kind={fields['kind']!r} is unknown: it is one of {', '.join(get_args(Kind))}"
        )
    _check_model(fields.get("model"), model_names)
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if prompt is None and messages is None:
        raise InvalidRequest("missing_field", "a line needs prompt or messages")
    if prompt is not None and messages is not None:
        raise InvalidRequest("invalid_parameter", "prompt and messages exclude each other: give one of them")
    text, token_ids = (None, None) if prompt is None else _prompt(prompt)
    return Request(
        line=number,
        prompt=text,
        prompt_token_ids=token_ids,
        messages=None if messages is None else _messages(messages),
        custom_id=custom_id,
        params=_params(_with_logprobs(fields, "plain")),
    )


def _read_score(fields: dict[str, Any], number: int, custom_id: str | None, model_names: Sequence[str]) -> Request:
    for name, value in fields.items():
        if name in _PARAMETERS and name != _SCORE_PARAMETER:
            if value is not None:
                raise InvalidRequest("unsupported_parameter", f"{name} means nothing for a score: leave it out")
        elif name not in _SCORE_FIELDS and name != _SCORE_PARAMETER:
            raise InvalidRequest("unknown_field", f"{name!r} is not a field of a line that asks for a score")
    if fields.get("kind") not in (None, "score"):
        raise InvalidRequest("invalid_parameter", "a line with continuation asks for a score: leave kind out")
    _check_model(fields.get("model"), model_names)
    text, context, continuation = (_text(fields, name) for name in ("text", "context", "continuation"))
    if (text is None) == (continuation is None) or (text is not None and context is not None):
        raise InvalidRequest("missing_field", "a score needs text, or context and continuation")
    if continuation == "":
        raise InvalidRequest("empty_continuation", "continuation is empty: there is nothing to score")
    return Request(
        line=number,
        kind="score",
        prompt=text,
        context=None if continuation is None else context or "",
        continuation=continuation,
        custom_id=custom_id,
        params=_params({_SCORE_PARAMETER: fields.get(_SCORE_PARAMETER)}),
    )


def _read_pooled(
    fields: dict[str, Any], number: int, custom_id: str | None, endpoint: Endpoint, model_names: Sequence[str]
) -> Request:
    """Of a plain line, or of the body of a batch line."""
    kind: Kind = _POOLED_KIND.get(endpoint) or fields.get("kind") or "embed"
    if kind not in _POOLED_KIND.values():
        raise InvalidRequest("invalid_parameter", f"kind={kind!r} does not go with input: it is embed or classify")
    own = _POOLED_FIELDS if endpoint == "plain" else _IGNORED_FIELDS
    for name, value in fields.items():
        if name in ("input", "model") or name in own or (name in _EMBED_FIELDS and kind == "embed"):
            continue
        if name in _PARAMETERS or name in _EMBED_FIELDS:
            if value is not None:
                raise InvalidRequest("unsupported_parameter", f"{name} means nothing for kind {kind}: leave it out")
        elif name not in _UNSUPPORTED:
            raise InvalidRequest(
                "unknown_field", f"{name!r} is not a field of a line of kind {kind}, which needs input"
            )
        elif value is not None:
            _refuse_field(name)
    _check_model(fields.get("model"), model_names)
    if fields.get("input") is None:
        raise InvalidRequest("missing_field", f"a line of kind {kind} needs input")
    text, token_ids, inputs = _input(fields["input"])
    return Request(
        line=number,
        kind=kind,
        endpoint=endpoint,
        prompt=text,
        prompt_token_ids=token_ids,
        inputs=inputs,
        custom_id=custom_id,
        dimensions=_dimensions(fields.get("dimensions")),
        encoding_format=_encoding_format(fields.get("encoding_format")),
    )


def _input(
    given: object,
) -> tuple[str | None, tuple[int, ...] | None, tuple[str | tuple[int, ...], ...] | None]:
    """Text, token ids, or several of either."""
    if not isinstance(given, list) or not given or isinstance(given[0], int):
        return *_prompt(given, "input"), None
    if len(given) > MAX_INPUTS:
        raise InvalidRequest("invalid_parameter", f"input has {len(given)} entries: it may have at most {MAX_INPUTS}")
    inputs: list[str | tuple[int, ...]] = []
    for index, each in enumerate(given):
        text, token_ids = _prompt(each, f"input[{index}]")
        inputs.append(token_ids or () if text is None else text)
    return None, None, tuple(inputs)


def _dimensions(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_TOKEN_COUNT):
        return value
    raise InvalidRequest("invalid_parameter", f"dimensions={value!r} is out of range: it must be a number from 1 on")


def _encoding_format(value: object) -> EncodingFormat:
    if value in (None, "float"):
        return "float"
    if value == "base64":
        return "base64"
    raise InvalidRequest("invalid_parameter", f"encoding_format={value!r} is unknown: it is float or base64")


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidRequest("invalid_type", f"{name} must be a string, not {_type_name(value)}")
    return value


def _read_body(
    body: object, number: int, custom_id: str | None, endpoint: Endpoint, model_names: Sequence[str]
) -> Request:
    if body is None:
        raise InvalidRequest("missing_field", "a batch line needs body")
    if not isinstance(body, dict):
        raise InvalidRequest("invalid_type", f"body must be an object, not {_type_name(body)}")
    if endpoint in _POOLED_KIND:
        return _read_pooled(body, number, custom_id, endpoint, model_names)
    content_field = _CONTENT_FIELD[endpoint]
    for name, value in body.items():
        _check_body_field(name, value, content_field)
    _check_model(body.get("model"), model_names)
    content = body.get(content_field)
    if content is None:
        raise InvalidRequest("missing_field", f"the body of a line for {endpoint} needs {content_field}")
    text, token_ids = _prompt(content) if content_field == "prompt" else (None, None)
    return Request(
        line=number,
        endpoint=endpoint,
        prompt=text,
        prompt_token_ids=token_ids,
        messages=_messages(content) if content_field == "messages" else None,
        custom_id=custom_id,
        params=_params(_with_logprobs(_with_max_tokens(body), endpoint)),
    )


def _check_body_field(name: str, value: object, content_field: str) -> None:
    if name in (content_field, "model", "max_completion_tokens", "top_logprobs"):
        return
    if name in _PARAMETERS or name in _IGNORED_FIELDS:
        return
    if name in _UNSUPPORTED:
        if value is None or any(_is_same(value, neutral) for neutral in _UNSUPPORTED[name]):
            return
        raise InvalidRequest("unsupported_parameter", f"{name} is not supported: leave it out")
    _refuse_field(name)


def _refuse_field(name: str) -> None:
    if name in _UNSUPPORTED:
        raise InvalidRequest("unsupported_parameter", f"{name} is not supported: leave it out")
    raise InvalidRequest("unknown_field", f"{name!r} is not a known field")


def _is_same(value: object, neutral: object) -> bool:
    # To Python 0 equals False, but logprobs=0 asks for something and logprobs=false does not.
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _check_model(asked: object, model_names: Sequence[str]) -> None:
    if asked is None or asked in model_names:
        return
    if not isinstance(asked, str):
        raise InvalidRequest("invalid_type", f"model must be a string, not {_type_name(asked)}")
    raise InvalidRequest(
        "unknown_model",
        f"the line asks for model {asked!r}, but this Job's is {model_names[0]!r}: leave model out of the line, or set "
        "model_name to the name the lines ask for",
    )


def _prompt(prompt: object, name: str = "prompt") -> tuple[str | None, tuple[int, ...] | None]:
    """Text, or token ids."""
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, list):
        raise InvalidRequest("invalid_type", f"{name} must be a string or token ids, not {_type_name(prompt)}")
    if prompt and isinstance(prompt[0], str | list):
        raise InvalidRequest("invalid_type", f"{name} must be one text: give each of a list a line of its own")
    for index, token in enumerate(prompt):
        if not isinstance(token, int) or isinstance(token, bool):
            raise InvalidRequest("invalid_type", f"{name}[{index}] must be a token id, not {_type_name(token)}")
        if not 0 <= token <= MAX_TOKEN_COUNT:
            raise InvalidRequest("invalid_token", f"{name}[{index}]={token} is no token id")
    if not prompt:
        raise InvalidRequest("empty_prompt", f"{name} has no token ids: it needs at least one")
    return None, tuple(prompt)


def _messages(messages: object) -> tuple[Message, ...]:
    if not isinstance(messages, list):
        raise InvalidRequest("invalid_type", f"messages must be a list, not {_type_name(messages)}")
    if not messages:
        raise InvalidRequest("invalid_parameter", "messages is empty: it needs at least one")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise InvalidRequest("invalid_type", f"{where} must be an object, not {_type_name(message)}")
    for name, value in message.items():
        if name not in ("role", "content") and value is not None:
            raise InvalidRequest("unsupported_parameter", f"{where} has {name!r}, which is not supported: leave it out")
    role, content = message.get("role"), message.get("content")
    if role is None or content is None:
        missing = "role" if role is None else "content"
        raise InvalidRequest("missing_field", f"{where} needs {missing}")
    if not isinstance(role, str):
        raise InvalidRequest("invalid_type", f"{where}.role must be a string, not {_type_name(role)}")
    if isinstance(content, list):
        content = "".join(_text_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise InvalidRequest("invalid_type", f"{where}.content must be a string, not {_type_name(content)}")
    return Message(role, content)


def _text_part(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise InvalidRequest("invalid_type", f"{where} must be an object, not {_type_name(part)}")
    if part.get("type") != "text":
        raise InvalidRequest("unsupported_parameter", f"{where} has type {part.get('type')!r}: only text is supported")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest("invalid_type", f"{where}.text must be a string, not {_type_name(text)}")
    return text


def _with_max_tokens(body: dict[str, Any]) -> dict[str, Any]:
    """The body with OpenAI's newer name for max_tokens under the older one."""
    newer, older = body.get("max_completion_tokens"), body.get("max_tokens")
    if newer is None:
        return body
    if older is not None and older != newer:
        raise InvalidRequest("invalid_parameter", "max_tokens and max_completion_tokens differ: give one of them")
    return {**body, "max_tokens": newer}


def _with_logprobs(fields: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """The fields with both of OpenAI's forms as the number of alternatives: a number for completions, for chat a
    boolean with the number in top_logprobs. Plain lines may use either."""
    logprobs, num_top = fields.get("logprobs"), fields.get("top_logprobs")
    if isinstance(logprobs, bool) or logprobs is None:
        if logprobs and endpoint == "/v1/completions":
            raise InvalidRequest("invalid_type", "logprobs must be a number here: how many alternatives per token")
        if not logprobs and num_top not in (None, 0):
            raise InvalidRequest("invalid_parameter", "top_logprobs needs logprobs: true beside it")
        if logprobs and num_top is not None:
            _check_top_logprobs(num_top)
        return {**fields, "logprobs": (num_top or 0) if logprobs else None}
    if endpoint == "/v1/chat/completions":
        raise InvalidRequest("invalid_type", "logprobs must be a boolean here: the number goes into top_logprobs")
    if num_top is not None:
        raise InvalidRequest("invalid_parameter", "logprobs and top_logprobs both give a number: leave one out")
    return fields


def _check_top_logprobs(value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest("invalid_type", f"top_logprobs must be a number, not {_type_name(value)}")
    if not 0 <= value <= MAX_LOGPROBS:
        raise InvalidRequest(
            "invalid_parameter", f"top_logprobs={value} is out of range: it must be between 0 and {MAX_LOGPROBS}"
        )


def _params(fields: Mapping[str, Any]) -> SamplingParams:
    given = {name: fields[name] for name in _PARAMETERS if fields.get(name) is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    try:
        params = msgspec.convert(given, SamplingParams, str_keys=True)  # logit_bias has token ids for keys
    except msgspec.ValidationError as error:
        raise InvalidRequest("invalid_type", f"a parameter has the wrong type: {error}") from error
    params.validate()
    return params


def _type_name(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
