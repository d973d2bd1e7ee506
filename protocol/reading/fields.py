"""Fields that several kinds of lines have, each checked: what is wrong is an InvalidRequest that names it.

Messages quote names and numbers. Whatever else stands in the wrong place may be somebody's prompt.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from protocol.errors import InvalidRequest
from protocol.sampling import MAX_TOKEN_COUNT

#: Characters; OpenAI's own are at most 64, and every Result row carries one.
MAX_CUSTOM_ID_LENGTH = 512
#: Said of a Request for its caller's own use: they change nothing and stand beside its Result. With their types.
CARRIED_FIELDS: dict[str, type] = {"user": str, "metadata": dict, "store": bool}
#: Characters that they may take together as JSON: OpenAI's limits for metadata come to some 10,000.
MAX_CARRIED_LENGTH = 65_536
#: Told to OpenAI about the caller, not about the answer.
IGNORED_FIELDS = frozenset({*CARRIED_FIELDS, "safety_identifier", "prompt_cache_key", "service_tier"})
#: OpenAI's and vLLM's parameters that are not supported, with the values that ask for nothing and so may stay.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
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
#: Of fields, kinds, formats and URLs; no sentence is one.
_NAME = re.compile(r"[A-Za-z0-9_./-]{1,64}")


@dataclass(frozen=True, slots=True)
class LineHead:
    """What every line has, whatever it asks for. `model_names` are what it may ask for, the usual one first."""

    number: int
    custom_id: str | None
    model_names: Sequence[str]
    carried: str | None = None  # as in Request


def read_custom_id(fields: Mapping[str, Any]) -> str | None:
    """Of `custom_id`, or of `id`, where a number will do."""
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
        raise InvalidRequest("invalid_type", f"custom_id must be a string, not {type_name(given)}")
    if len(given) > MAX_CUSTOM_ID_LENGTH:
        limit = f"at most {MAX_CUSTOM_ID_LENGTH} characters"
        raise InvalidRequest("invalid_parameter", f"custom_id has {len(given)} characters: it may have {limit}")
    return given


def read_carried(fields: Mapping[str, Any]) -> str | None:
    """What CARRIED_FIELDS there are, as a JSON object."""
    given = {name: fields[name] for name in CARRIED_FIELDS if fields.get(name) is not None}
    if not given:
        return None
    for name, value in given.items():
        if not isinstance(value, CARRIED_FIELDS[name]):
            wanted = type_name(CARRIED_FIELDS[name]())
            raise InvalidRequest("invalid_type", f"{name} must be {wanted}, not {type_name(value)}")
    text = msgspec.json.encode(given).decode()
    if len(text) > MAX_CARRIED_LENGTH:
        limit = f"at most {MAX_CARRIED_LENGTH} together"
        raise InvalidRequest(
            "invalid_parameter", f"{', '.join(given)} have {len(text)} characters as JSON: they may have {limit}"
        )
    return text


def check_model(asked: object, model_names: Sequence[str]) -> None:
    """Refuses a model that is none of these names for the Job's, the usual one first."""
    if asked is None or asked in model_names:
        return
    if not isinstance(asked, str):
        raise InvalidRequest("invalid_type", f"model must be a string, not {type_name(asked)}")
    raise InvalidRequest(
        "unknown_model",
        f"the line asks for model {asked!r}, but this Job's is {model_names[0]!r}: leave model out of the line, or map "
        f"it: --model-map {asked}={model_names[0]}",
    )


def read_prompt(prompt: object, name: str = "prompt") -> tuple[str | None, tuple[int, ...] | None]:
    """Text, or token ids."""
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, list):
        raise InvalidRequest("invalid_type", f"{name} must be a string or token ids, not {type_name(prompt)}")
    if prompt and isinstance(prompt[0], str | list):
        raise InvalidRequest("invalid_type", f"{name} must be one text: give each of a list a line of its own")
    for index, token in enumerate(prompt):
        if not isinstance(token, int) or isinstance(token, bool):
            raise InvalidRequest("invalid_type", f"{name}[{index}] must be a token id, not {type_name(token)}")
        if not 0 <= token <= MAX_TOKEN_COUNT:
            raise InvalidRequest("invalid_token", f"{name}[{index}]={token} is no token id")
    if not prompt:
        raise InvalidRequest("empty_prompt", f"{name} has no token ids: it needs at least one")
    return None, tuple(prompt)


def read_text(fields: Mapping[str, Any], name: str) -> str | None:
    """The field of this name, which must be a string where it is there."""
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidRequest("invalid_type", f"{name} must be a string, not {type_name(value)}")
    return value


def refuse_field(name: str) -> NoReturn:
    """Of a field that has no meaning where it stands."""
    if name in UNSUPPORTED:
        raise InvalidRequest("unsupported_parameter", f"{name} is not supported: leave it out")
    raise InvalidRequest("unknown_field", f"{quoted(name)} is not a known field")


def quoted(value: object) -> str:
    """How messages show what was given: a name or a number as it is, of anything else what it is."""
    if isinstance(value, str):
        return repr(value) if _NAME.fullmatch(value) else f"<{len(value)} characters>"
    return repr(value) if isinstance(value, bool | int | float) else f"<{type_name(value)}>"


def type_name(value: object) -> str:
    """How messages call what JSON has there."""
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
