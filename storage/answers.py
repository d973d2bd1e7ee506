"""Answers by key: rows in SQL, which keep them, and their bounded hot copy in Redis, which may vanish at any moment.

Redis keys, all written by one script and all dropped together when no answer was put for the TTL:
    millrace:answers        hash    answer key (32 bytes) -> Answer as msgpack
    millrace:answers:age    zset    answer key, scored by when it was put (milliseconds of the server's clock)
    millrace:answers:bytes  string  sum over the hash of key and value lengths
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, cast

import msgspec
from redis import Redis
from sqlalchemy import Connection, select, update

from protocol.frames import FinishReason
from protocol.requests import Answer
from storage.batches import batches
from storage.clock import now, now_once
from storage.insertion import insert_new
from storage.ledger import Ledger
from storage.optional_redis import OptionalRedis, connect
from storage.tables import answers

log = logging.getLogger("millrace.storage.answers")

#: Seconds within which another use of an answer in SQL is not written down: it would cost a write for every read.
USED_S = 86_400.0

_KEYS = ("millrace:answers", "millrace:answers:age", "millrace:answers:bytes")

# Scripts run as one step in Redis, so the counter is exact. An eviction by Redis itself may take one key of the three:
# then everything starts afresh.
_BEGIN = """
local num_bytes = tonumber(redis.call('GET', KEYS[3]))
local num_answers = redis.call('HLEN', KEYS[1])
if num_answers ~= redis.call('ZCARD', KEYS[2]) or (num_answers > 0) ~= (num_bytes ~= nil) then
    redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
    num_bytes = nil
end
num_bytes = num_bytes or 0

local function drop(key)
    if redis.call('ZREM', KEYS[2], key) == 1 then
        num_bytes = num_bytes - #key - redis.call('HSTRLEN', KEYS[1], key)
        redis.call('HDEL', KEYS[1], key)
    end
end
"""

# What is too old goes first, so that it can be put anew; then the oldest go until the rest fits.
_PUT = (
    _BEGIN
    + """
local ttl_ms, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now_ms - ttl_ms)) do
    drop(key)
end
for i = 3, #ARGV, 2 do
    local size = #ARGV[i] + #ARGV[i + 1]
    if size <= max_bytes and redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1]) == 1 then
        redis.call('ZADD', KEYS[2], now_ms, ARGV[i])
        num_bytes = num_bytes + size
    end
end
while num_bytes > max_bytes do
    drop(redis.call('ZRANGE', KEYS[2], 0, 0)[1])
end

if num_bytes > 0 then
    redis.call('SET', KEYS[3], string.format('%d', num_bytes))
    for i = 1, 3 do
        redis.call('PEXPIRE', KEYS[i], ttl_ms)
    end
else
    redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
end
"""
)

_FORGET = (
    _BEGIN
    + """
for _, key in ipairs(ARGV) do
    drop(key)
end
if num_bytes > 0 then
    redis.call('SET', KEYS[3], string.format('%d', num_bytes), 'KEEPTTL')
else
    redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
end
"""
)

#: Of an Answer, in the order of both tables that hold them.
ANSWER_COLUMNS = Answer.__struct_fields__
_columns = attrgetter(*ANSWER_COLUMNS)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Answer).decode


def find_answers(ledger: Ledger, keys: Iterable[bytes]) -> dict[bytes, Answer]:
    """Those of the answers that are known, which counts as their use. Raises DatabaseUnavailable."""
    wanted = list(dict.fromkeys(keys))
    if not wanted:
        return {}  # making the statement alone would be a tenth of a call's way through a worker
    is_stale = answers.c.used_at < now_once() - USED_S
    columns_of_answer = select(answers.c.key, is_stale, *(answers.c[name] for name in ANSWER_COLUMNS))

    def work(connection: Connection) -> tuple[dict[bytes, Answer], list[bytes]]:
        found, stale = {}, []
        for batch in batches(wanted):
            for key, is_stale, *columns in connection.execute(columns_of_answer.where(answers.c.key.in_(batch))):
                found[key] = to_answer(*columns)
                if is_stale:
                    stale.append(key)
        return found, stale

    found, stale = ledger.read(work)
    if stale:
        ledger.write(partial(_mark_used, keys=sorted(stale)))
    return found


def _mark_used(connection: Connection, keys: list[bytes]) -> None:
    for batch in batches(keys):
        connection.execute(update(answers).where(answers.c.key.in_(batch)).values(used_at=now()))


def to_answer(
    text: str,
    finish_reason: FinishReason,
    prompt_tokens: int,
    completion_tokens: int,
    logprobs: bytes | None,
    score: bytes | None,
    embedding: bytes | None,
    classification: bytes | None,
) -> Answer:
    """Of the values of ANSWER_COLUMNS, here or among the Results."""
    return Answer(
        text=text,
        finish_reason=finish_reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        logprobs=logprobs,
        score=score,
        embedding=embedding,
        classification=classification,
    )


def insert_answers(connection: Connection, new: Mapping[bytes, Answer]) -> None:
    """Keep these answers; one that is known already stays as it is."""
    # In one order for everybody, so that two transactions with the same new answers do not deadlock.
    rows = [(key, *_columns(new[key])) for key in sorted(new)]
    insert_new(connection, answers, ("key", *ANSWER_COLUMNS), rows, stamped=("used_at",))


class AnswerCache:
    """The hot copy, shared by all workers. Whatever goes wrong with Redis, it merely knows nothing."""

    def __init__(
        self, redis: Redis, ttl_s: float, max_bytes: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`redis` must return bytes. `max_bytes` counts keys and answers, without Redis' own overhead."""
        self._redis = redis
        self._link = OptionalRedis(
            redis,
            log,
            absent="Redis does not hold answers for now, SQL alone does",
            present="Redis holds answers again",
            clock=clock,
        )
        self._ttl_ms = max(1, int(ttl_s * 1000))
        self._max_bytes = max_bytes
        self._put = redis.register_script(_PUT)
        self._forget = redis.register_script(_FORGET)

    @classmethod
    def connect(cls, broker_url: str, ttl_s: float, max_bytes: int) -> "AnswerCache":
        """The hot copy in the queue's own Redis; `broker_url` as Celery takes it. Connects to nothing yet."""
        return cls(connect(broker_url), ttl_s, max_bytes)

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, Answer]:
        """Those of the answers that are in Redis."""
        found = {}
        for batch in batches(dict.fromkeys(keys)):
            nothing: tuple[list[Any], list[Any], float] = ([], [], 0.0)
            values, ages, now_ms = self._link.call(partial(self._read, batch), nothing)
            for key, value, put_ms in zip(batch, values, ages, strict=False):
                # What is too old is dropped only with the next put.
                if value is None or put_ms is None or put_ms < now_ms - self._ttl_ms:
                    continue
                answer = _readable(value)
                if answer is not None:
                    found[key] = answer
        return found

    def put_many(self, new: Mapping[bytes, Answer]) -> None:
        """Add these answers; older ones make room."""
        for batch in batches(new):
            pairs = [part for key in batch for part in (key, _encode(new[key]))]
            self._link.call(partial(self._put, _KEYS, [self._ttl_ms, self._max_bytes, *pairs]), None)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Drop these answers. Where Redis is away they go when their time is over, as all do."""
        for batch in batches(keys):
            self._link.call(partial(self._forget, _KEYS, batch), None)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _read(self, keys: list[bytes]) -> tuple[list[Any], list[Any], float]:
        """The values, when each was put, and the time now, both in milliseconds of the server's clock."""
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.hmget(_KEYS[0], keys)
            pipeline.zmscore(_KEYS[1], cast(list[str], keys))
            pipeline.time()
            values, ages, (seconds, microseconds) = pipeline.execute()
        return values, ages, seconds * 1000 + microseconds / 1000


def _readable(value: bytes) -> Answer | None:
    try:
        return _decode(value)
    except msgspec.MsgspecError:
        return None
