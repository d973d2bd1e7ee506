"""Submitting Jobs and reading their Results, without torch: `from producer import Client, AsyncClient`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from producer.async_client import AsyncClient as AsyncClient
    from producer.client import Client as Client
else:
    # Loaded when they are asked for: whoever wants another module of this package does without SQL and Celery.
    _MODULES = {"AsyncClient": "producer.async_client", "Client": "producer.client"}

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)

    def __dir__():
        return sorted(__all__)


__all__ = ["AsyncClient", "Client"]
