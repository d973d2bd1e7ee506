"""Flights: which worker computes an answer right now, so that equal Requests in several workers are computed once.

A hint that costs a second computation when it is lost: whether an answer is known, the ledger alone says.

Redis keys:
    millrace:flight:<answer key>  string  the owner who computes it; expires after a day at the latest
    millrace:aboard:<owner>       string  there as long as the owner lives; the flights of one without are anybody's
"""

import logging
from collections.abc import Collection
from functools import partial
from typing import Any

from redis import Redis

from storage.batches import batches
from storage.optional_redis import OptionalRedis, connect

log = logging.getLogger("millrace.storage.flights")

_FLIGHT = b"millrace:flight:"
_ABOARD = "millrace:aboard:"
#: Longer than any answer takes; only what a dead worker left gets that old.
_MAX_FLIGHT_MS = 86_400_000
#: How long an owner counts as alive after a sign of life: for a dead one's answers others wait no longer than that.
_ABOARD_MS = 5_000

# Each answers with the positions, from 1, of the keys that are somebody else's, who lives.
_CLAIM = """
local owner, max_ms, aboard = ARGV[1], ARGV[2], ARGV[3]
local held, lives = {}, {}
for i, key in ipairs(KEYS) do
    local other = redis.call('GET', key)
    if other and other ~= owner then
        if lives[other] == nil then
            lives[other] = redis.call('EXISTS', aboard .. other) == 1
        end
    end
    if other and other ~= owner and lives[other] then
        held[#held + 1] = i
    else
        redis.call('SET', key, owner, 'PX', max_ms)
    end
end
return held
"""

_RELEASE = """
for _, key in ipairs(KEYS) do
    if redis.call('GET', key) == ARGV[1] then
        redis.call('DEL', key)
    end
end
"""


class Flights:
    """One owner's. Whatever goes wrong with Redis, nobody else computes anything, as far as this owner knows."""

    def __init__(self, redis: Redis, owner: str) -> None:
        self._link = OptionalRedis(
            redis,
            log,
            absent="Redis does not say what other workers compute, so what they have in common is computed twice",
            present="Redis says again what other workers compute",
        )
        self._owner = owner
        self._claim: Any = redis.register_script(_CLAIM)
        self._release: Any = redis.register_script(_RELEASE)

    @classmethod
    def connect(cls, broker_url: str, owner: str) -> "Flights":
        """Over the queue's own Redis; connects to nothing yet."""
        return cls(connect(broker_url), owner)

    def beat(self) -> None:
        """A sign of life: to be given every second or so."""
        aboard = _ABOARD + self._owner
        self._link.call(lambda: self._link.redis.set(aboard, "1", px=_ABOARD_MS), None)

    def claim(self, keys: Collection[bytes]) -> set[bytes]:
        """Take off with all of these that nobody else computes; returns those that somebody else does."""
        held: set[bytes] = set()
        for batch in batches(keys):
            arguments = [self._owner, _MAX_FLIGHT_MS, _ABOARD]
            names = [_FLIGHT + key for key in batch]
            positions: list[int] = self._link.call(partial(self._claim, keys=names, args=arguments), [])
            held.update(batch[position - 1] for position in positions)
        return held

    def release(self, keys: Collection[bytes]) -> None:
        """These are in the database, or not computed any more: others may have them."""
        for batch in batches(keys):
            names = [_FLIGHT + key for key in batch]
            self._link.call(partial(self._release, keys=names, args=[self._owner]), None)

    def close(self) -> None:
        """The owner ends: its flights are anybody's."""
        self._link.call(lambda: self._link.redis.delete(_ABOARD + self._owner), None)
        self._link.redis.close()
