"""Settings: one frozen struct, read once at the edge from defaults, a TOML file, MILLRACE_* variables and the caller.

`MILLRACE_CONFIG` names the TOML file (default: millrace.toml in the working directory, if it is there). Unknown keys
and unknown MILLRACE_* variables are errors, since a misspelt limit that is silently ignored costs more than a stop.
"""

import ipaddress
import os
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from protocol.errors import ConfigurationError

ENV_PREFIX = "MILLRACE_"
CONFIG_VARIABLE = "MILLRACE_CONFIG"
DEFAULT_CONFIG_FILE = "millrace.toml"
#: Set by a supervising parent for its own child, so it is no setting: the descriptor whose end-of-file means "stop".
PARENT_FD_VARIABLE = "MILLRACE_PARENT_FD"


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine process needs to know; travels to it as JSON."""

    model: str = "models/millrace-tiny"
    revision: str | None = None  # of a hub name; a local folder has none
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on CPU | float32 | bfloat16 | float16
    layout: str = "auto"  # auto | packed | padded; auto: packed where the model allows it
    attention: str = "auto"  # auto | sdpa | flash-attn-2
    max_model_len: int | None = None  # tokens, prompt and output together; None: what the model's config says
    kv_tokens: int | None = None  # capacity of the KV cache; None: from memory_fraction on CUDA, a fixed size on CPU
    memory_fraction: float = 0.90  # of the device's memory, for weights, activations and KV cache together
    max_batch_tokens: int = 8192  # tokens per step
    max_num_seqs: int = 256  # Sequences running at once
    admission: Literal["auto", "headroom", "peak"] = "auto"  # when a Sequence starts: batching/scheduler.py
    prefix_reuse: bool = True  # keep computed prompts, and let those who begin alike share them
    lookahead: int | None = None  # steps launched before the last one's tokens are known; None: 1 on CUDA, 0 on CPU
    num_threads: int | None = None  # torch threads on CPU; None: torch's own choice


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be configured. In TOML the engine's part is the table [engine]."""

    broker_url: str = "redis://127.0.0.1:6379/0"
    database_url: str = "sqlite:///millrace.db"
    model_name: str | None = None  # the name clients ask for; None: the last part of engine.model
    tenant: str = "default"
    engine: EngineSettings = EngineSettings()
    num_engines: int | None = None  # of a worker; None: one per visible GPU where engine.device is auto, else one

    chunk_requests: int = 64  # Requests per Chunk at most
    chunk_bytes: int = 262_144  # of prompt text per Chunk at most, so that long prompts spread over workers too
    lease_seconds: float = 30.0  # a worker that dies holds its Chunks up to this long
    intake_tokens: int | None = None  # tokens taken in before a worker stops consuming; None: twice the KV cache
    answers_ttl_seconds: float = 86_400.0  # of the hot copy in Redis; SQL keeps answers until they are pruned
    answers_max_bytes: int = 268_435_456  # of the hot copy in Redis
    engine_start_seconds: float = 600.0  # how long a model may take to load
    log_level: str = "INFO"

    @property
    def served_model(self) -> str:
        return self.model_name or self.engine.model.rstrip("/").rsplit("/", 1)[-1]

    def check_topology(self) -> None:
        """Raises ConfigurationError when SQLite would have to be shared with another machine."""
        if not self.database_url.startswith("sqlite"):
            return
        host = urlsplit(self.broker_url).hostname or "localhost"
        if self.broker_url.startswith("redis+socket://") or _is_this_machine(host):
            return
        raise ConfigurationError(
            f"database_url is SQLite ({self.database_url}) but the broker is on another machine ({host}): workers "
            "there could not open the file, and SQLite over a network file system loses data. Set "
            "MILLRACE_DATABASE_URL to postgresql+psycopg://user:password@host/name, or use a broker on this machine"
        )


def load_settings(overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Defaults, then the TOML file, then MILLRACE_* variables, then `overrides` (dotted names for the engine's part).

    Raises ConfigurationError for an unreadable file, an unknown name, or a value of the wrong type.
    """
    environ = os.environ if environ is None else environ
    values = _read_toml(environ)
    for name, text in environ.items():
        if name.startswith(ENV_PREFIX) and name not in (CONFIG_VARIABLE, PARENT_FD_VARIABLE):
            _place(values, _dotted(name), text, source=f"the variable {name}")
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _place(values, dotted, value, source=f"the option {dotted}")
    try:
        return msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"a setting has the wrong type: {error}") from error


def _read_toml(environ: Mapping[str, str]) -> dict[str, Any]:
    named = environ.get(CONFIG_VARIABLE)
    path = Path(named or DEFAULT_CONFIG_FILE)
    if not named and not path.is_file():
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read the settings file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the settings file {path} is not valid TOML: {error}") from error
    _check_names(values, Settings, f"the settings file {path}", "")
    if "engine" in values:
        if not isinstance(values["engine"], dict):
            raise ConfigurationError(f"the settings file {path} sets 'engine' to a value: it is a table, [engine]")
        _check_names(values["engine"], EngineSettings, f"the settings file {path}", "engine.")
    return values


def _dotted(variable: str) -> str:
    """MILLRACE_ENGINE_MAX_NUM_SEQS -> engine.max_num_seqs, unless the plain name is a setting of its own."""
    name = variable.removeprefix(ENV_PREFIX).lower()
    if name.startswith("engine_") and name not in Settings.__struct_fields__:
        return "engine." + name.removeprefix("engine_")
    return name


def _place(values: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    table, _, name = dotted.rpartition(".")
    _check_names({name: value}, EngineSettings if table == "engine" else Settings, source, "")
    target = values.setdefault("engine", {}) if table == "engine" else values
    target[name] = value


def _check_names(values: Mapping[str, Any], struct: type[msgspec.Struct], source: str, prefix: str) -> None:
    for name in values:
        if name not in struct.__struct_fields__:
            known = ", ".join(sorted(prefix + field for field in struct.__struct_fields__))
            raise ConfigurationError(f"{source} sets {prefix}{name}, which is not a setting. Settings are: {known}")


def _is_this_machine(host: str) -> bool:
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
