"""compose.yaml as Docker Compose reads it: YAML merges, then variables."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
_VARIABLE = re.compile(r"\$\$|\$\{(?P<name>\w+)(?:(?P<how>:-|:\?)(?P<rest>[^}]*))?\}")


class MissingVariable(Exception):
    """A variable that must be set is not."""


def read_compose(variables: Mapping[str, str]) -> Any:
    """The whole file as plain values. Raises MissingVariable."""
    return _interpolated(yaml.safe_load((ROOT / "compose.yaml").read_text()), variables)


def _interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _interpolated(each, variables) for name, each in value.items()}
    if isinstance(value, list):
        return [_interpolated(each, variables) for each in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        given = variables.get(match["name"])
        if match["how"] and not given:
            if match["how"] == ":?":
                raise MissingVariable(f"{match['name']}: {match['rest']}")
            return match["rest"]
        return given or ""

    return _VARIABLE.sub(replace, value)
