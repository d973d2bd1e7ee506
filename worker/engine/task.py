"""Which task a model is served for: what the settings say, else what its files say. Imports no torch."""

import json
from pathlib import Path
from typing import Literal

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings

Task = Literal["generate", "embed", "classify"]

TASKS: tuple[Task, ...] = ("generate", "embed", "classify")
#: Ends of the names of transformers' classes that continue a text.
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def choose_task(folder: Path, settings: EngineSettings) -> Task:
    """Raises ConfigurationError for a task that is unknown."""
    for task in TASKS:
        if settings.task == task:
            return task
    if settings.task != "auto":
        raise ConfigurationError(f"engine.task={settings.task!r} is unknown: it is one of auto, {', '.join(TASKS)}")
    # sentence-transformers' own file; many of its models are stored as the language models that they were.
    if (folder / "modules.json").is_file():
        return "embed"
    names = _architectures(folder)
    if any(name.endswith("ForSequenceClassification") for name in names):
        return "classify"
    if not names or any(name.endswith(_GENERATING) for name in names):
        return "generate"
    return "embed"


def _architectures(folder: Path) -> list[str]:
    try:
        names = json.loads((folder / "config.json").read_bytes()).get("architectures")
    except (OSError, ValueError, AttributeError):
        return []  # left to whoever loads it, who says what is wrong
    return [str(name) for name in names] if isinstance(names, list) else []
