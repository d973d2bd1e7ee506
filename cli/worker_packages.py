"""The packages that only a worker has, looked for before anything is started."""

from importlib.util import find_spec

from protocol.errors import ConfigurationError

_NAMES = ("torch", "transformers", "safetensors", "numpy", "jinja2")


def check_worker_packages() -> None:
    """Raises ConfigurationError where only a client is installed. Loads nothing."""
    missing = [name for name in _NAMES if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"this command needs the worker's packages, and {', '.join(missing)} cannot be imported: "
            "pip install torch, then pip install '.[worker]' in Millrace's folder"
        )
