"""Priority classes, the most urgent first: what is more urgent always goes first, whatever else waits."""

from typing import Literal, get_args

from protocol.errors import ConfigurationError

Priority = Literal["interactive", "normal", "bulk"]

PRIORITIES: tuple[Priority, ...] = get_args(Priority)
#: Of a Job that asks for none.
DEFAULT_PRIORITY: Priority = "normal"
#: Of prompts whose caller waits.
ASKED_PRIORITY: Priority = "interactive"


def rank(priority: Priority) -> int:
    """As Sequences carry it: lower is more urgent. Raises ConfigurationError for what is no class."""
    if priority not in PRIORITIES:
        raise ConfigurationError(f"priority={priority!r} is unknown: it is one of {', '.join(PRIORITIES)}")
    return PRIORITIES.index(priority)
