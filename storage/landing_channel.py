"""LandingChannel: word through Redis that Results of a Job have landed, for whoever waits for them.

It is sent after the commit and may get lost: who waits also looks into the ledger now and then.

Redis channels:
    millrace:job:<id>  ids of Chunks with new Results, in decimal with commas between; empty: look at the whole Job
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from redis import Redis

from storage.optional_redis import OptionalRedis, connect

log = logging.getLogger("millrace.storage.landings")

_PREFIX = "millrace:job:"


def channel(job_id: str) -> str:
    """The Job's channel."""
    return _PREFIX + job_id


def read_word(message: Mapping[str, Any]) -> tuple[str, set[int] | None]:
    """The Job and the Chunks that a message of redis-py's PubSub, of any type, is about; None: any of the Job's."""
    job_id = message["channel"].decode().removeprefix(_PREFIX)
    if message["type"] != "message":
        return job_id, None  # subscribed only now: whatever was said before went by
    numbers = message["data"].split(b",")
    is_readable = all(number.isdigit() for number in numbers)
    return job_id, {int(number) for number in numbers} if is_readable else None


class LandingChannel:
    """The sending side. Whatever goes wrong with Redis, the word is merely not sent."""

    def __init__(self, redis: Redis) -> None:
        self._link = OptionalRedis(
            redis,
            log,
            absent="Redis carries no word of new Results, so who waits for them finds them a second later",
            present="Redis carries word of new Results again",
        )

    @classmethod
    def connect(cls, broker_url: str) -> "LandingChannel":
        """Over the queue's own Redis; connects to nothing yet."""
        return cls(connect(broker_url))

    def publish(self, landed: Mapping[str, Collection[int]]) -> None:
        """Say of each Job in which Chunks Results have landed; in none of them: that its state has changed."""
        if landed:
            self._link.call(lambda: self._publish(landed), None)

    def close(self) -> None:
        """Close the connections."""
        self._link.redis.close()

    def _publish(self, landed: Mapping[str, Collection[int]]) -> None:
        with self._link.redis.pipeline(transaction=False) as pipeline:
            for job_id, chunk_ids in landed.items():
                pipeline.publish(channel(job_id), ",".join(map(str, chunk_ids)))
            pipeline.execute()
