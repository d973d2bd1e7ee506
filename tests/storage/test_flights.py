"""Who computes what, over a real Redis: one owner at a time, and nobody's once its owner is dead or lets go."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
import redis

from storage.flights import Flights

KEYS = [bytes([number]) * 32 for number in range(256)]


@pytest.fixture
def flights(redis_url: str) -> Iterator[Callable[[str], Flights]]:
    with ExitStack() as stack:

        def of_owner(owner: str) -> Flights:
            made = stack.enter_context(closing(Flights.connect(redis_url, owner)))
            made.beat()
            return made

        yield of_owner


def test_what_one_owner_computes_is_held_for_the_others_until_it_lets_go(flights: Callable[[str], Flights]) -> None:
    one, other = flights("one"), flights("other")
    assert one.claim(KEYS[:100]) == set()
    assert one.claim(KEYS[:100]) == set()
    assert other.claim(KEYS[50:]) == set(KEYS[50:100])
    other.release(KEYS[:60])
    assert other.claim(KEYS[:60]) == set(KEYS[:60])
    one.release(KEYS[:60])
    assert other.claim(KEYS[:100]) == set(KEYS[60:100])
    assert one.claim(KEYS) == {*KEYS[:60], *KEYS[100:]}


def test_a_dead_owners_flights_are_anybodys(flights: Callable[[str], Flights], redis_url: str) -> None:
    one, other = flights("one"), flights("other")
    one.claim(KEYS)
    with redis.Redis.from_url(redis_url) as server:
        assert 0 < server.pttl("millrace:aboard:one") <= 5_000
        # As when it has given no sign of life for some seconds.
        server.delete("millrace:aboard:one")
    assert other.claim(KEYS) == set()
    one.beat()
    assert one.claim(KEYS) == set(KEYS)


def test_without_redis_nobody_else_computes_anything() -> None:
    with closing(Flights.connect("redis://127.0.0.1:1/0", "one")) as lonely:
        lonely.beat()
        assert lonely.claim(KEYS) == set()
        lonely.release(KEYS)
