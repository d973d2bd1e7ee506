"""The settings file, changed in place: what stands in it, and how, stays as it is."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.errors import ConfigurationError
from protocol.settings import CONFIG_VARIABLE, DEFAULT_CONFIG_FILE

if TYPE_CHECKING:
    from tomlkit import TOMLDocument


def default_settings_file() -> Path:
    """The one that is read when settings are loaded."""
    return Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG_FILE)


def check_settings_file(path: Path, table: str) -> None:
    """Raises ConfigurationError when `write_settings` would, as far as that can be known before."""
    _read(path, table)
    folder = Path(os.path.realpath(path)).parent
    if not os.access(folder, os.W_OK):
        raise ConfigurationError(
            f"cannot write the settings file {path}: nothing can be written in the folder {folder}"
        )


def write_settings(path: Path, table: str, values: Mapping[str, int]) -> None:
    """Set `values` in a table of the file, which need not exist.

    Raises ConfigurationError when it is no TOML, has something else under the table's name, or cannot be written.
    """
    import tomlkit

    document = _read(path, table)
    part = document.setdefault(table, tomlkit.table())
    for name, value in values.items():
        part[name] = value
    # A link stays a link, and what only its owner may read stays so.
    target = Path(os.path.realpath(path))
    beside = target.with_name(target.name + ".new")
    try:
        beside.touch()
        if target.exists():
            shutil.copymode(target, beside)
        beside.write_text(tomlkit.dumps(document), encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigurationError(f"cannot write the settings file {path}: {error.strerror}") from error


def _read(path: Path, table: str) -> "TOMLDocument":
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        document = tomlkit.parse(path.read_text(encoding="utf-8")) if path.exists() else tomlkit.document()
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the settings file {path} is not valid TOML: {error}; mend it, or name another with --settings FILE"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"cannot read the settings file {path}: {error.strerror}") from error
    if not isinstance(document.get(table, {}), Mapping):
        raise ConfigurationError(f"the settings file {path} sets {table!r} to a value: it is a table, [{table}]")
    return document
