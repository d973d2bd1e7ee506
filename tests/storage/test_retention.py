"""What becomes of answers that nobody uses any more, in SQL and in Redis."""

import pytest
import redis as redis_py
from sqlalchemy import select, update

from protocol.requests import Answer
from storage import batches, retention
from storage.answers import AnswerCache, find_answers, insert_answers
from storage.clock import now
from storage.ledger import Ledger
from storage.retention import AnswerTotals, count_answers, delete_unused_answers
from storage.tables import answers

DAY_S = 86_400.0
HOUR_S = 3_600.0


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def put(ledger: Ledger, cache: AnswerCache, numbers: range, *, unused_s: float, **fields: bytes) -> None:
    """Answers that were last used so long ago, also in the hot copy."""
    new = {
        key(number): Answer(text=f"ä{number}", finish_reason="stop", prompt_tokens=1, completion_tokens=2, **fields)
        for number in numbers
    }
    ledger.write(lambda connection: insert_answers(connection, new))
    used = update(answers).where(answers.c.key.in_(list(new))).values(used_at=now() - unused_s)
    ledger.write(lambda connection: connection.execute(used))
    cache.put_many(new)


def unused_s(ledger: Ledger, number: int) -> float:
    age = select(now() - answers.c.used_at).where(answers.c.key == key(number))
    return ledger.read(lambda connection: float(connection.execute(age).scalar_one()))


@pytest.fixture
def cache(redis_url: str) -> AnswerCache:
    return AnswerCache.connect(redis_url, ttl_s=60, max_bytes=1 << 20)


def test_unused_answers_go_from_sql_and_from_redis(
    ledger: Ledger, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_PAGE", 4)
    monkeypatch.setattr(batches, "_MAX_SIZE", 3)
    put(ledger, cache, range(10, 30), unused_s=31 * DAY_S, embedding=b"1234")
    put(ledger, cache, range(30, 35), unused_s=29 * DAY_S)
    put(ledger, cache, range(35, 40), unused_s=31 * DAY_S)
    # A key, "ä" and two digits in UTF-8, and 20 of them an embedding.
    expected = AnswerTotals(25, 25 * (32 + 4) + 20 * 4)
    told: list[AnswerTotals] = []

    assert count_answers(ledger, 30 * DAY_S) == expected
    assert count_answers(ledger).num_answers == 30
    assert delete_unused_answers(ledger, cache, 30 * DAY_S, told.append) == expected

    everything = [key(number) for number in range(10, 40)]
    kept = {key(number) for number in range(30, 35)}
    assert set(cache.get_many(everything)) == kept
    assert set(find_answers(ledger, everything)) == kept
    assert told[-1] == expected
    assert len(told) > 3
    assert delete_unused_answers(ledger, cache, 30 * DAY_S) == AnswerTotals(0, 0)


def test_finding_an_answer_is_its_use_and_is_written_down_once_a_day(ledger: Ledger, cache: AnswerCache) -> None:
    put(ledger, cache, range(1), unused_s=23 * HOUR_S)
    put(ledger, cache, range(1, 3), unused_s=25 * HOUR_S)

    assert len(find_answers(ledger, [key(0), key(1)])) == 2

    assert unused_s(ledger, 0) > 22 * HOUR_S
    assert unused_s(ledger, 1) < HOUR_S
    assert unused_s(ledger, 2) > 24 * HOUR_S


def test_answers_go_though_redis_is_away(ledger: Ledger, cache: AnswerCache) -> None:
    put(ledger, cache, range(3), unused_s=31 * DAY_S)
    absent = AnswerCache.connect("redis://127.0.0.1:1/0", ttl_s=60, max_bytes=1 << 20)

    assert delete_unused_answers(ledger, absent, 30 * DAY_S).num_answers == 3

    assert find_answers(ledger, [key(0)]) == {}
    assert len(cache.get_many([key(number) for number in range(3)])) == 3


def test_hot_copy_gives_nothing_out_whose_time_is_over(cache: AnswerCache, redis_url: str) -> None:
    answer = Answer(text="a", finish_reason="stop", prompt_tokens=1, completion_tokens=2)
    cache.put_many({key(0): answer, key(1): answer})
    with redis_py.Redis.from_url(redis_url) as redis:
        # As if it had been put 61 seconds ago, and others since, which keep all of the copy in Redis.
        redis.zincrby("millrace:answers:age", -61_000, key(0))

    assert set(cache.get_many([key(0), key(1)])) == {key(1)}
