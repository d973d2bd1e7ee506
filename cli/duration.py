"""Duration: a length of time as an option's value, as in 30d."""

import re
from typing import Any

import click

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_FORM = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)([smhdw])")


class Duration(click.ParamType[float]):
    """Seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Fails as click does, with exit code 2."""
        if isinstance(value, float):
            return value
        found = _FORM.fullmatch(value)
        if found is None:
            self.fail(f"{value!r} is no length of time: give a number with its unit, as in 30d, 12h, 2w or 0d.", param)
        return float(found[1]) * _SECONDS[found[2]]
