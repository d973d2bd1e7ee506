"""What `from producer import` gives, to programs and to type checkers."""

import inspect
from typing import assert_type

import pytest

import producer
from producer import AsyncClient, Client
from producer.async_client import AsyncClient as TheAsyncClient
from producer.client import Client as TheClient


def test_package_exports_the_clients_and_nothing_else() -> None:
    assert producer.__all__ == dir(producer) == ["AsyncClient", "Client"]
    assert_type(Client, type[TheClient])
    assert_type(AsyncClient, type[TheAsyncClient])
    assert (Client, AsyncClient) == (TheClient, TheAsyncClient)
    with pytest.raises(AttributeError, match="module 'producer' has no attribute 'Server'"):
        getattr(producer, "Server")  # noqa: B009  (a checker would rightly refuse the plain form)


def test_coroutines_have_the_whole_client() -> None:
    """All its calls with the same parameters, but for what only threads need; `submit` takes more kinds of source."""

    def calls(of: type) -> dict[str, dict[str, object]]:
        public = {name: member for name, member in vars(of).items() if not name.startswith("_") and callable(member)}
        return {
            name: {
                parameter.name: parameter.default
                for parameter in inspect.signature(member).parameters.values()
                if parameter.name != "wakeup"
            }
            for name, member in public.items()
            if name != "ask_future"
        }

    assert calls(AsyncClient) == calls(Client)
    for name in calls(Client):
        assert getattr(Client, name).__doc__
        assert getattr(AsyncClient, name).__doc__
