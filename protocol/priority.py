"""Priority classes, the most urgent first: what is more urgent always goes first, whatever else waits."""

from typing import Literal, get_args

Priority = Literal["interactive", "normal", "bulk"]

PRIORITIES: tuple[Priority, ...] = get_args(Priority)
#: Of a Job that asks for none.
DEFAULT_PRIORITY: Priority = "normal"
#: Of prompts whose caller waits.
ASKED_PRIORITY: Priority = "interactive"


def rank(priority: Priority) -> int:
    """As Sequences carry it: lower is more urgent."""
    return PRIORITIES.index(priority)
