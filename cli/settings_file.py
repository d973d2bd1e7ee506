"""The settings file, changed in place: what stands in it, and how, stays as it is."""

import os
from collections.abc import Mapping
from pathlib import Path

from protocol.errors import ConfigurationError
from protocol.settings import CONFIG_VARIABLE, DEFAULT_CONFIG_FILE


def default_settings_file() -> Path:
    """The one that is read when settings are loaded."""
    return Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG_FILE)


def write_settings(path: Path, table: str, values: Mapping[str, int]) -> None:
    """Set `values` in a table of the file, which need not exist.

    Raises ConfigurationError when it is no TOML or cannot be written.
    """
    import tomlkit
    from tomlkit.exceptions import ParseError

    try:
        document = tomlkit.parse(path.read_text(encoding="utf-8")) if path.exists() else tomlkit.document()
        part = document.setdefault(table, tomlkit.table())
        for name, value in values.items():
            part[name] = value
        beside = path.with_name(path.name + ".new")
        beside.write_text(tomlkit.dumps(document), encoding="utf-8")
        beside.replace(path)
    except (ParseError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the settings file {path} is not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigurationError(f"cannot write the settings file {path}: {error.strerror}") from error
