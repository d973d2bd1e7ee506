"""Answers by key: the rows in SQL and the bounded hot copy in a real Redis."""

import logging
import socket
from collections.abc import Iterator
from typing import cast

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from protocol.requests import Answer
from storage.answers import AnswerCache, find_answers, insert_answers
from storage.ledger import Ledger
from storage.tables import answers
from tests.storage.samples import num_rows

_HASH, _AGE, _BYTES = "millrace:answers", "millrace:answers:age", "millrace:answers:bytes"


def _key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def _answer(text: str) -> Answer:
    return Answer(text=text, finish_reason="stop", prompt_tokens=1, completion_tokens=2)


@pytest.fixture
def redis(redis_url: str) -> "Iterator[Redis]":
    with Redis.from_url(redis_url) as client:
        yield client


def _check_counter(redis: Redis) -> int:
    """The byte counter must say exactly what the hash holds, and the ages must be of exactly its keys."""
    held = redis.hgetall(_HASH)
    assert set(redis.zrange(_AGE, 0, -1)) == set(held)
    num_bytes = sum(len(key) + len(value) for key, value in held.items())
    assert int(redis.get(_BYTES) or 0) == num_bytes
    return num_bytes


def test_find_answers_knows_what_was_inserted_and_keeps_the_first(ledger: Ledger) -> None:
    many = {_key(number): _answer(f"answer {number}") for number in range(1200)}
    ledger.write(lambda connection: insert_answers(connection, many))
    ledger.write(lambda connection: insert_answers(connection, {_key(0): _answer("another")}))
    ledger.write(lambda connection: insert_answers(connection, {}))

    assert find_answers(ledger, [*many, _key(5000)]) == many
    assert find_answers(ledger, []) == {}
    assert num_rows(ledger, answers) == 1200


def test_the_cache_knows_what_was_put(redis: Redis) -> None:
    cache = AnswerCache(redis, ttl_s=60, max_bytes=1 << 20)
    many = {_key(number): _answer(f"answer {number}\x00\ud7ff") for number in range(1200)}
    assert cache.get_many(many) == {}

    cache.put_many(many)
    cache.put_many({})

    assert cache.get_many([*many, _key(5000), _key(1)]) == many
    assert cache.get_many([]) == {}
    _check_counter(redis)


def test_all_keys_vanish_together_after_the_ttl(redis: Redis) -> None:
    AnswerCache(redis, ttl_s=60, max_bytes=1 << 20).put_many({_key(1): _answer("a")})
    assert [55_000 < redis.pttl(name) <= 60_000 for name in (_HASH, _AGE, _BYTES)] == [True] * 3


def test_the_oldest_answers_make_room_so_that_the_limit_holds_exactly(redis: Redis) -> None:
    cache = AnswerCache(redis, ttl_s=60, max_bytes=1 << 20)
    cache.put_many({_key(0): _answer("ten bytes.")})
    size = _check_counter(redis)
    cache = AnswerCache(redis, ttl_s=60, max_bytes=10 * size)

    for number in range(1, 25):
        cache.put_many({_key(number): _answer("ten bytes.")})
        assert _check_counter(redis) == min(number + 1, 10) * size
        _make_older(redis)

    assert set(cache.get_many(map(_key, range(25)))) == {_key(number) for number in range(15, 25)}

    # One byte less holds one answer less.
    AnswerCache(redis, ttl_s=60, max_bytes=10 * size - 1).put_many({_key(24): _answer("ten bytes.")})
    assert _check_counter(redis) == 9 * size


def _make_older(redis: Redis, by_ms: int = 1000) -> None:
    """Let time pass for all answers."""
    members = cast(list[bytes], redis.zrange(_AGE, 0, -1))
    for member in members:
        redis.zincrby(_AGE, -by_ms, member)


def test_many_answers_at_once_are_trimmed_to_the_limit(redis: Redis) -> None:
    cache = AnswerCache(redis, ttl_s=60, max_bytes=10_000)
    cache.put_many({_key(number): _answer("x" * (number % 300)) for number in range(2000)})
    assert 9_000 < _check_counter(redis) <= 10_000


def test_an_answer_larger_than_the_limit_pushes_nothing_out(redis: Redis) -> None:
    cache = AnswerCache(redis, ttl_s=60, max_bytes=1000)
    cache.put_many({_key(1): _answer("small")})
    cache.put_many({_key(2): _answer("x" * 1000), _key(3): _answer("small")})
    assert set(cache.get_many([_key(1), _key(2), _key(3)])) == {_key(1), _key(3)}
    _check_counter(redis)


def test_nothing_is_kept_when_nothing_may_be(redis: Redis) -> None:
    cache = AnswerCache(redis, ttl_s=60, max_bytes=0)
    cache.put_many({_key(1): _answer("a")})
    assert cache.get_many([_key(1)]) == {}
    assert redis.keys() == []


def test_what_is_older_than_the_ttl_is_dropped_and_can_be_put_anew(redis: Redis) -> None:
    cache = AnswerCache(redis, ttl_s=60, max_bytes=1 << 20)
    cache.put_many({_key(1): _answer("old"), _key(2): _answer("old")})
    _make_older(redis, by_ms=61_000)
    cache.put_many({_key(2): _answer("new"), _key(3): _answer("new")})

    assert cache.get_many([_key(1), _key(2), _key(3)]) == {_key(2): _answer("new"), _key(3): _answer("new")}
    _check_counter(redis)


def test_an_answer_that_is_known_stays_and_counts_once(redis: Redis) -> None:
    cache = AnswerCache(redis, ttl_s=60, max_bytes=1 << 20)
    cache.put_many({_key(1): _answer("first")})
    before = _check_counter(redis)
    cache.put_many({_key(1): _answer("the second, which is longer")})
    assert cache.get_many([_key(1)]) == {_key(1): _answer("first")}
    assert _check_counter(redis) == before


def test_the_cache_goes_on_after_redis_lost_everything(redis: Redis) -> None:
    cache = AnswerCache(redis, ttl_s=60, max_bytes=1 << 20)
    cache.put_many({_key(1): _answer("a")})
    redis.flushall()
    redis.script_flush()

    assert cache.get_many([_key(1)]) == {}
    cache.put_many({_key(2): _answer("b")})
    assert cache.get_many([_key(1), _key(2)]) == {_key(2): _answer("b")}
    _check_counter(redis)


@pytest.mark.parametrize("lost", [_HASH, _AGE, _BYTES])
def test_the_cache_starts_afresh_when_redis_evicted_one_of_its_keys(redis: Redis, lost: str) -> None:
    cache = AnswerCache(redis, ttl_s=60, max_bytes=1 << 20)
    cache.put_many({_key(1): _answer("a")})
    redis.delete(lost)

    cache.put_many({_key(2): _answer("b")})

    assert cache.get_many([_key(1), _key(2)]) == {_key(2): _answer("b")}
    _check_counter(redis)


def test_an_unreadable_value_is_no_answer(redis: Redis) -> None:
    redis.hset(_HASH, _key(1), b"\xc1 of another version")
    assert AnswerCache(redis, ttl_s=60, max_bytes=1 << 20).get_many([_key(1)]) == {}


def test_an_absent_redis_knows_nothing_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    client = Redis(host="127.0.0.1", port=1, password="secret", retry=Retry(NoBackoff(), 0))
    cache = AnswerCache(client, ttl_s=60, max_bytes=1 << 20, clock=lambda: now)

    for _ in range(3):
        cache.put_many({_key(1): _answer("a")})
        assert cache.get_many([_key(1)]) == {}
        now += 60

    (record,) = caplog.records
    assert (record.name, record.levelno) == ("millrace.storage.answers", logging.WARNING)
    assert "secret" not in record.getMessage()


def test_an_absent_redis_is_left_alone_for_a_while_and_then_used_again(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    cache = AnswerCache(redis, ttl_s=60, max_bytes=1 << 20, clock=lambda: now)
    cache.put_many({_key(1): _answer("a")})
    # A wrong type is an error of every command, as a server that is out of memory would answer.
    redis.rename(_HASH, "kept")
    redis.set(_HASH, "no hash")
    assert cache.get_many([_key(1)]) == {}
    redis.rename("kept", _HASH)

    assert cache.get_many([_key(1)]) == {}
    now += 60
    with caplog.at_level(logging.INFO, "millrace.storage.answers"):
        assert cache.get_many([_key(1)]) == {_key(1): _answer("a")}
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_redis_that_hangs_knows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        client = Redis(port=port, socket_timeout=0.05, retry=Retry(NoBackoff(), 0))
        assert AnswerCache(client, ttl_s=60, max_bytes=1 << 20).get_many([_key(1)]) == {}
        client.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
