"""Settings: one frozen struct, read once at the edge from defaults, a TOML file, MILLRACE_* variables and the caller.

`MILLRACE_CONFIG` names the TOML file (default: millrace.toml in the working directory, if it is there). Unknown keys
and unknown MILLRACE_* variables are errors, since a misspelt limit that is silently ignored costs more than a stop.
"""

import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import msgspec

from protocol.broker_tls import check_tls
from protocol.errors import ConfigurationError
from protocol.faults import FAULT_VARIABLE
from protocol.sentinels import SCHEME, parse_sentinels

ENV_PREFIX = "MILLRACE_"
CONFIG_VARIABLE = "MILLRACE_CONFIG"
DEFAULT_CONFIG_FILE = "millrace.toml"
#: Set by a supervising parent for its own child, so it is no setting: the descriptor whose end-of-file means "stop".
PARENT_FD_VARIABLE = "MILLRACE_PARENT_FD"
#: Settings that are several words, which a variable holds with commas between them.
_LISTS = ("also_serves",)
_WRONG_TYPE = re.compile(r"Expected `([a-z]+)(?: \| null)?`, got `[^`]+` - at `\$\.([a-z_.]+)`")
_WRONG_CHOICE = re.compile(r"Invalid enum value .* - at `\$\.([a-z_.]+)`", re.DOTALL)
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "array": "a list"}
#: Settings whose values no message shows.
_SECRETS = ("broker_url", "database_url", "flower_password")
_NO_SETTINGS = (CONFIG_VARIABLE, PARENT_FD_VARIABLE, FAULT_VARIABLE)

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
#: The least and the most of every number. The most is where the next one to hold it would break: a database's integer,
#: a timer, the memory for what is kept of each row, or a message that no worker could finish within its lease.
LIMITS: dict[str, tuple[float, float]] = {
    "num_engines": (1, 1024),
    "chunk_requests": (1, 1_000_000),
    "chunk_bytes": (1, 2**30),
    "lease_seconds": (0.1, 86_400),
    "intake_tokens": (1, 2**53),
    "answers_ttl_seconds": (0.001, 10 * 366 * 86_400),
    "answers_max_bytes": (0, 2**53),
    "engine_start_seconds": (0.1, 7 * 86_400),
    "engine_hang_seconds": (0.1, 7 * 86_400),
    "drain_seconds": (0, 7 * 86_400),
    "engine.max_model_len": (2, 2**31 - 1),
    "engine.kv_tokens": (1, 2**53),
    "engine.memory_fraction": (0.01, 1),
    "engine.max_batch_tokens": (1, 2**31 - 1),
    "engine.max_num_seqs": (1, 65_536),
    "engine.lookahead": (0, 1),
    "engine.num_threads": (1, 65_536),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "log_level": LOG_LEVELS,
    "engine.task": ("auto", "generate", "embed", "classify"),
    "engine.pooling": ("auto", "mean", "last", "cls"),
    "engine.dtype": ("auto", "float32", "bfloat16", "float16"),
    "engine.layout": ("auto", "packed", "padded"),
    "engine.attention": ("auto", "sdpa", "sparse", "flash-attn-2", "triton"),
}
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")
#: Transports of Celery that are a Redis: known answers and the bell's messages are kept in the same one.
_BROKER_SCHEMES = ("redis", "rediss", "redis+socket", SCHEME)


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine process needs to know; travels to it as JSON."""

    model: str = "models/millrace-tiny"
    """The model that answers: a folder with config.json and *.safetensors, or a name on the model hub."""
    revision: str | None = None
    """The commit, branch or tag of a hub name; a local folder has none."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`; auto takes a GPU where there is one."""
    dtype: str = "auto"
    """What weights and activations are computed in; auto is bfloat16 on CUDA, on a CPU float32, but for
    large models kept in bfloat16 where the CPU computes in it natively."""
    quantization: Literal["none", "float8", "int8"] = "none"
    """What the weights of the model's layers are rounded to at load, and what they are multiplied with as it comes:
    float8 (e4m3) or int8, half as large and less exact."""
    task: str = "auto"
    """What the model is for: `generate` (and score), `embed` or `classify`; auto: what its files say."""
    pooling: str = "auto"
    """How tokens become an embedding; auto: what the model's files say."""
    normalize: bool | None = None
    """Embeddings to length 1; unset: what the model's files say, else true."""
    layout: str = "auto"
    """Of a step: packed in one flat row, or padded to a rectangle; auto packs where the model allows it."""
    attention: str = "auto"
    """The attention backend; auto is triton on CUDA, else flash-attn-2 where it is installed, on a CPU sparse in
    float32, else sdpa."""
    max_model_len: int | None = None
    """Tokens of one Sequence, prompt and output together; unset: what the model's config says."""
    kv_dtype: Literal["auto", "float8"] = "auto"
    """What K and V are kept in: what the model computes in, or float8 (e4m3), half as large and less exact."""
    kv_tokens: int | None = None
    """Capacity of the KV cache in tokens; unset: from memory_fraction on CUDA, a fixed size on a CPU."""
    memory_fraction: float = 0.90
    """Part of the GPU's memory for weights, activations and KV cache together."""
    max_batch_tokens: int | None = None
    """Tokens per step at most; unset: about 16,384 on CUDA, 2048 on a CPU, 8192 where it embeds or classifies."""
    max_num_seqs: int | None = None
    """Sequences running at once at most; unset: 1024 on CUDA, 256 on a CPU."""
    admission: Literal["auto", "headroom", "peak"] = "auto"
    """When a Sequence starts: by the `peak` of blocks to come where lengths are known, else by `headroom`."""
    prefix_reuse: bool = True
    """Keep computed prompts, and let those who begin alike share them."""
    lookahead: int | None = None
    """Steps launched before the last one's tokens are known; unset: 1 on CUDA, 0 on a CPU."""
    fuse_weights: bool = True
    """Linear layers that share their input become one, where the model allows it."""
    compile: bool | None = None
    """Layers through torch.compile; unset: on CUDA, where the first start takes longer for it."""
    graphs: bool = True
    """On CUDA, decode steps as CUDA graphs, captured at the start."""
    num_threads: int | None = None
    """Threads of torch on a CPU; unset: torch's own choice."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be configured. In TOML the engine's part is the table [engine]."""

    broker_url: str = "redis://127.0.0.1:6379/0"
    """Redis: the queue, Celery's results and the hot copy of answers. `rediss://` is TLS, `sentinel://` Sentinels."""
    database_url: str = "sqlite:///millrace.db"
    """The ledger: SQLite, with a broker on the same machine only, or `postgresql+psycopg://user:password@host/name`."""
    model_name: str | None = None
    """The name clients ask for, and part of the queue's; unset: the last part of engine.model."""
    also_serves: tuple[str, ...] = ()
    """Further names whose Jobs and calls this worker takes too, and answers with the one model it has; in the variable
    with commas between them."""
    tenant: str = "default"
    """Whose Jobs and answers these are: tenants see nothing of each other."""
    engine: EngineSettings = EngineSettings()
    """The engine's part."""
    num_engines: int | None = None
    """Engines of one worker; unset: one per visible GPU where engine.device is auto, else one."""

    chunk_requests: int = 1024
    """Requests per Chunk, that is per queue message, at most; a Job's first 2048 lines make Chunks of 64."""
    chunk_bytes: int = 2_097_152
    """Bytes of prompt text per Chunk at most, and 4096 per Request, so that long prompts spread over workers too."""
    shared_queue: str = "celery"
    """The queue that workers of all models take interactive tasks from, beside their own; the default is where a
    foreign Celery app sends what it says nothing about. Empty: none."""
    lease_seconds: float = 30.0
    """A worker that dies holds its Chunks and interactive tasks up to this long."""
    intake_tokens: int | None = None
    """Tokens taken in before a worker stops consuming; unset: twice the KV cache."""
    answers_ttl_seconds: float = 86_400.0
    """How long an answer stays in its hot copy in Redis; SQL keeps it until it is pruned."""
    answers_max_bytes: int = 268_435_456
    """Size of the hot copy in Redis at most."""
    engine_start_seconds: float = 600.0
    """How long a model may take to load."""
    engine_hang_seconds: float | None = None
    """An engine that has work and finishes no step for so long is killed; unset: 60 on CUDA, 600 on a CPU."""
    drain_seconds: float = 20.0
    """How long a worker that is to stop goes on with what it has begun, before it gives the rest back."""
    flower_user: str = "millrace"
    """Who may see `millrace flower`."""
    flower_password: str | None = None
    """Their password; without one, Flower listens on the loopback alone and has no API."""
    log_level: str = "INFO"
    """The lowest level that a worker logs."""

    @property
    def served_model(self) -> str:
        return self.model_name or self.engine.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def served_models(self) -> tuple[str, ...]:
        """All names whose queues a worker takes from, its own first."""
        return tuple(dict.fromkeys((self.served_model, *self.also_serves)))

    def check(self) -> None:
        """Raises ConfigurationError naming the first setting whose value is out of range, and its limits."""
        for name, (least, most) in LIMITS.items():
            value = self._value(name)
            # Not a number is within no limits.
            if value is not None and not least <= value <= most:
                raise ConfigurationError(f"{name}={value} is out of range: it must be from {least:,} to {most:,}")
        for name, choices in CHOICES.items():
            if self._value(name) not in choices:
                raise ConfigurationError(f"{name}={self._value(name)!r} is unknown: it is one of {', '.join(choices)}")
        if not _DEVICE.fullmatch(self.engine.device):
            raise ConfigurationError(
                f"engine.device={self.engine.device!r} is unknown: it is auto, cpu, cuda or cuda:N"
            )
        for name in self.also_serves:
            if not name or "," in name:
                raise ConfigurationError(f"also_serves has {name!r}: a name has a character at least, and no comma")
        _check_broker(self.broker_url)

    def _value(self, dotted: str) -> Any:
        table, _, name = dotted.rpartition(".")
        return getattr(self.engine if table else self, name)

    def check_topology(self) -> None:
        """`check`, and raises ConfigurationError when SQLite would have to be shared with another machine."""
        self.check()
        if not self.database_url.startswith("sqlite"):
            return
        sentinels = parse_sentinels(self.broker_url)
        hosts = [urlsplit(self.broker_url).hostname or "localhost"] if sentinels is None else dict(sentinels.hosts)
        host = next((host for host in hosts if not _is_this_machine(host)), None)
        if self.broker_url.startswith("redis+socket://") or host is None:
            return
        raise ConfigurationError(
            f"database_url is SQLite ({self.database_url}) but the broker is on another machine ({host}): workers "
            "there could not open the file, and SQLite over a network file system loses data. Set "
            "MILLRACE_DATABASE_URL to postgresql+psycopg://user:password@host/name, or use a broker on this machine"
        )


def load_settings(overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Defaults, then the TOML file, then MILLRACE_* variables, then `overrides` (dotted names for the engine's part).

    Raises ConfigurationError for an unreadable file, an unknown name, or a value of the wrong type or out of range.
    """
    environ = os.environ if environ is None else environ
    values = _read_toml(environ)
    for name, text in environ.items():
        if name.startswith(ENV_PREFIX) and name not in _NO_SETTINGS:
            dotted = _dotted(name)
            _place(values, dotted, _listed(text) if dotted in _LISTS else text, source=f"the variable {name}")
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _place(values, dotted, value, source=f"the option {dotted}")
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigurationError(_wrong_value(str(error), values)) from error
    settings.check()
    return settings


def _wrong_value(said: str, values: Mapping[str, Any]) -> str:
    """What msgspec said of a value, with the setting's name, the value, and what it may be."""
    if match := _WRONG_TYPE.fullmatch(said):
        expected, dotted = match.groups()
        given = dotted if dotted in _SECRETS else f"{dotted}={_value_of(dotted, values)!r}"
        return f"{given} has the wrong type: it must be {_TYPES.get(expected, expected)}"
    if match := _WRONG_CHOICE.fullmatch(said):
        (dotted,) = match.groups()
        choices = get_args(EngineSettings.__annotations__[dotted.removeprefix("engine.")])
        return f"{dotted}={_value_of(dotted, values)!r} is unknown: it is one of {', '.join(choices)}"
    return f"a setting has the wrong type: {said}"


def _value_of(dotted: str, values: Mapping[str, Any]) -> Any:
    value: Any = values
    for name in dotted.split("."):
        value = value[name]
    return value


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


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _place(values: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    if dotted == "engine":
        raise ConfigurationError(f"{source} sets 'engine', which is a table: set one of its names, as in engine.model")
    table, _, name = dotted.rpartition(".")
    _check_names({name: value}, EngineSettings if table == "engine" else Settings, source, "")
    target = values.setdefault("engine", {}) if table == "engine" else values
    target[name] = value


def _check_names(values: Mapping[str, Any], struct: type[msgspec.Struct], source: str, prefix: str) -> None:
    for name in values:
        if name not in struct.__struct_fields__:
            known = ", ".join(sorted(prefix + field for field in struct.__struct_fields__))
            raise ConfigurationError(f"{source} sets {prefix}{name}, which is not a setting. Settings are: {known}")


def _check_broker(url: str) -> None:
    """The message leaves the URL out: it may hold a password."""
    if parse_sentinels(url) is not None:
        return
    try:
        parts = urlsplit(url)
        _ = parts.port
        if parts.scheme in ("redis", "rediss") and parts.path.strip("/"):
            _ = int(parts.path.strip("/"))  # the number of a database
    except ValueError as error:
        raise ConfigurationError(
            "broker_url cannot be read: it must look like redis://:password@host:6379/0, with a port up to 65535, the "
            "number of a database, and with /, # and ? of a password written as %2F, %23 and %3F"
        ) from error
    if parts.scheme not in _BROKER_SCHEMES:
        raise ConfigurationError(
            f"broker_url is of an unknown kind: {parts.scheme or 'no scheme'!r}; use redis://:password@host:6379/0"
        )
    check_tls(url)


def _is_this_machine(host: str) -> bool:
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
