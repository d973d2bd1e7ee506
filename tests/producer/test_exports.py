"""What `from producer import` gives, to programs and to type checkers."""

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
