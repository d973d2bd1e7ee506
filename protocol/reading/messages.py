"""Messages of a chat, as OpenAI's lines and plain ones give them."""

from protocol.errors import InvalidRequest
from protocol.reading.fields import quoted, type_name
from protocol.requests import Message

#: Of OpenAI's messages. Any other name may be what somebody has to say.
_OPENAI_FIELDS = frozenset(
    {"annotations", "audio", "function_call", "name", "reasoning_content", "refusal", "tool_call_id", "tool_calls"}
)


def read_messages(messages: object) -> tuple[Message, ...]:
    """Raises InvalidRequest naming what is wrong and where."""
    if not isinstance(messages, list):
        raise InvalidRequest("invalid_type", f"messages must be a list, not {type_name(messages)}")
    if not messages:
        raise InvalidRequest("invalid_parameter", "messages is empty: it needs at least one")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise InvalidRequest("invalid_type", f"{where} must be an object, not {type_name(message)}")
    for name, value in message.items():
        if name not in ("role", "content") and value is not None:
            shown = repr(name) if name in _OPENAI_FIELDS else "a field beside role and content"
            raise InvalidRequest("unsupported_parameter", f"{where} has {shown}, which is not supported: leave it out")
    role, content = message.get("role"), message.get("content")
    if role is None or content is None:
        missing = "role" if role is None else "content"
        raise InvalidRequest("missing_field", f"{where} needs {missing}")
    if not isinstance(role, str):
        raise InvalidRequest("invalid_type", f"{where}.role must be a string, not {type_name(role)}")
    if isinstance(content, list):
        content = "".join(_text_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise InvalidRequest("invalid_type", f"{where}.content must be a string, not {type_name(content)}")
    return Message(role, content)


def _text_part(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise InvalidRequest("invalid_type", f"{where} must be an object, not {type_name(part)}")
    if part.get("type") != "text":
        raise InvalidRequest(
            "unsupported_parameter", f"{where} has type {quoted(part.get('type'))}: only text is supported"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest("invalid_type", f"{where}.text must be a string, not {type_name(text)}")
    return text
