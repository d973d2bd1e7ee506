"""Finding: what `millrace doctor` found out about one thing, and how checks report each of theirs."""

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from protocol.errors import MillraceError

State = Literal["ok", "warning", "failed"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report; `facts` are for people, `way_out` is what to do about it."""

    name: str
    state: State
    facts: str
    way_out: str | None = None


Check = Callable[[], Iterator[Finding]]


def ok(name: str, facts: str) -> Finding:
    return Finding(name=name, state="ok", facts=facts)


def warning(name: str, facts: str, way_out: str) -> Finding:
    return Finding(name=name, state="warning", facts=facts, way_out=way_out)


def failed(name: str, facts: str, way_out: str | None = None) -> Finding:
    return Finding(name=name, state="failed", facts=facts, way_out=way_out)


def findings(name: str, check: Check) -> Iterator[Finding]:
    """All that `check` finds; whatever it raises is a failure of `name`, and the other checks go on."""
    try:
        yield from check()
    except MillraceError as error:
        yield failed(name, _one_line(error))  # our messages hold the way out
    except Exception as error:
        yield failed(name, f"{type(error).__name__}: {_one_line(error)}")


def shown_bytes(num_bytes: float) -> str:
    """In the unit that leaves a number below 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
