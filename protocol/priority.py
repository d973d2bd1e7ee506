"""Priority classes, the most urgent first: what is more urgent always goes first, whatever else waits."""

from typing import Literal, get_args

Priority = Literal["interactive", "normal", "bulk"]

PRIORITIES: tuple[Priority, ...] = get_args(Priority)
#: Of a Job that asks for none.
DEFAULT_PRIORITY: Priority = "normal"


def rank(priority: Priority) -> int:
    """As Sequences carry it: lower is more urgent."""
    return PRIORITIES.index(priority)
