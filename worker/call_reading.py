"""Reading a call, the arguments of an interactive task, as one Request.

It has the fields of a plain line by keyword. The one argument by position is the content; or what an earlier task of a
chain or a group returned, one Reply's mapping or a list of them. Then its text is the content, or, where content is
given by keyword as well, what stands there for `{text}`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from protocol.celery_app import CALL_TASKS, interactive_queue
from protocol.errors import InvalidRequest
from protocol.reading.fields import LineHead
from protocol.reading.plain_line import read_plain
from protocol.reading.pooled_line import read_pooled
from protocol.reading.score_line import read_score
from protocol.requests import Kind, Request

#: Where an earlier answer goes in a text given by keyword.
_PLACEHOLDER = "{text}"

_CONTENT: dict[Kind, tuple[str, ...]] = {
    "generate": ("prompt", "messages"),
    "score": ("text", "context", "continuation"),
    "embed": ("input",),
    "classify": ("input",),
}
_READERS: dict[Kind, Callable[[Mapping[str, Any], LineHead], Request]] = {
    "generate": read_plain,
    "score": read_score,
    "embed": read_pooled,
    "classify": read_pooled,
}


def read_call(kind: Kind, args: Sequence[Any], kwargs: Mapping[str, Any], models: Sequence[str]) -> Request:
    """Raises InvalidRequest, whose message holds nothing of the content."""
    try:
        fields = {name: value for name, value in kwargs.items() if value is not None}
        _check_model(fields.pop("model", None), models)
        if fields.setdefault("kind", kind) != kind:
            raise InvalidRequest("invalid_parameter", f"kind is {kind} in this task: leave it out")
        return _READERS[kind](_with_argument(kind, args, fields), LineHead(1, None, models))
    except InvalidRequest as error:
        raise InvalidRequest(error.code, _without_content(error.message, args, kwargs)) from None


def _check_model(asked: object, models: Sequence[str]) -> None:
    if asked is None or asked in models:
        return
    model = models[0]
    raise InvalidRequest(
        "unknown_model",
        f"the task asks for a model that is not this worker's, which is {model!r}: leave model out, or send the task "
        f"to the queue of the other model, which is called like {interactive_queue(model)}",
    )


def _with_argument(kind: Kind, args: Sequence[Any], fields: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return fields
    task = next(name for name, of in CALL_TASKS.items() if of == kind)
    if len(args) > 1:
        raise InvalidRequest(
            "invalid_type", f"{task} takes one argument by position, not {len(args)}: give the others by keyword"
        )
    texts = _earlier_texts(args[0], task)
    given = [name for name in _CONTENT[kind] if name in fields]
    if texts is None:
        if given:
            raise InvalidRequest("invalid_parameter", f"{given[0]} is given by keyword and by position: leave one out")
        name = "messages" if kind == "generate" and _are_messages(args[0]) else _CONTENT[kind][0]
        return {**fields, name: args[0]}
    text = "\n\n".join(texts)
    if given == ["context"]:
        return {**fields, "continuation": text}
    if given:
        if not any(_PLACEHOLDER in word for name in given for word in words(fields[name])):
            raise InvalidRequest(
                "invalid_parameter",
                f"{given[0]} has no {_PLACEHOLDER} for what the task before this one returned: put it where that goes, "
                "or chain an immutable signature, which is given nothing",
            )
        return {name: _filled(value, text) if name in given else value for name, value in fields.items()}
    is_several = kind in ("embed", "classify") and isinstance(args[0], list | tuple)
    return {**fields, _CONTENT[kind][0]: texts if is_several else text}


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _earlier_texts(value: Any, task: str) -> list[str] | None:
    """Of what earlier tasks returned, for this one; None when this is no such thing."""
    replies = value if isinstance(value, list | tuple) and value else [value]
    if not all(isinstance(reply, dict) and "text" in reply and "usage" in reply for reply in replies):
        return None
    samples = [sample for reply in replies for sample in reply.get("samples") or [reply]]
    for sample in samples:
        if "embedding" in sample or not isinstance(sample.get("text"), str):
            came = next((what for what in ("embedding", "score") if what in sample), "answer")
            raise InvalidRequest(
                "invalid_type",
                f"the task before this one returned no text (its {came} has none): {task} goes on with what "
                "millrace.generate or millrace.classify returned",
            )
    return [sample["text"] for sample in samples]


def _filled(value: Any, text: str) -> Any:
    """The texts of a prompt, a list or messages with the earlier answer in its place."""
    if isinstance(value, str):
        return value.replace(_PLACEHOLDER, text)
    if isinstance(value, list | tuple):
        return [_filled(each, text) for each in value]
    if isinstance(value, dict):
        return {name: _filled(each, text) for name, each in value.items()}
    return value


def _without_content(message: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Readers quote what is wrong: a caller's words become their number."""
    for word in {*words(args), *(word for name, value in kwargs.items() if name != "kind" for word in words(value))}:
        message = message.replace(repr(word), f"<{len(word)} characters>")
    return message


def words(value: Any) -> Iterator[str]:
    """All texts in a call's arguments, which may be nested deeper than functions may be."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list | tuple):
            left.extend(value)
