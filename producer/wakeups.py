"""Wakeups: wakes whoever waits for a Job when Redis carries word of new Results, over one connection per client.

A word may get lost, so nobody waits without a time after which to look into the ledger anyhow.
"""

import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

from redis.backoff import NoBackoff
from redis.client import PubSub
from redis.exceptions import RedisError
from redis.retry import Retry

from storage.landing_channel import channel, read_word
from storage.optional_redis import connect

#: Seconds between two looks at whom to listen for. A subscription that comes late wakes its waiter, so nothing is
#: missed meanwhile.
_TURN_S = 0.02
#: Seconds the connection is kept for the next who waits, and seconds until the next try after Redis did not answer.
_LINGER_S = 10.0
_RETRY_S = 1.0
#: Seconds between two pings that show whether a quiet connection is still one.
_PING_S = 30


class WaitStopped(Exception):
    """Raised to a waiter whom somebody else has stopped."""


class Wakeup:
    """One waiter's alarm, which stays rung until it is waited for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._landed: set[int] | None = set()
        self._is_rung = False
        self._is_stopped = False
        #: Whether word comes through at the moment; without it a waiter has to look more often.
        self.is_heard = False

    def ring(self, chunk_ids: set[int] | None) -> None:
        """Results have landed in these Chunks; None: anywhere."""
        with self._changed:
            self._is_rung = True
            self._landed = None if chunk_ids is None or self._landed is None else self._landed | chunk_ids
            self._changed.notify()

    def stop(self) -> None:
        """Let whoever waits now or later stop doing so."""
        self._is_stopped = True
        self.ring(None)

    def check(self) -> None:
        """Raises WaitStopped after `stop`."""
        if self._is_stopped:
            raise WaitStopped

    def wait(self, timeout_s: float) -> Set[int] | None:
        """The Chunks with news since the last wait, as soon as there are any; None: look at the whole Job.

        Raises WaitStopped.
        """
        with self._changed:
            is_rung = self._changed.wait_for(lambda: self._is_rung, timeout_s)
            landed = self._landed if is_rung else None
            self._landed, self._is_rung = set(), False
        self.check()
        return landed


class Wakeups:
    """Thread-safe. Its own thread listens while anybody waits; without Redis nobody is woken."""

    def __init__(self, broker_url: str) -> None:
        self._redis = connect(broker_url, retry=Retry(NoBackoff(), 0), health_check_interval=_PING_S)
        self._changed = threading.Condition()
        self._waiting: dict[str, list[Wakeup]] = {}
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def listen(self, job_id: str, wakeup: Wakeup | None = None) -> Iterator[Wakeup]:
        """An alarm, by default a new one, that rings for the Job until the end of the context."""
        wakeup = wakeup or Wakeup()
        self.add(job_id, wakeup)
        try:
            yield wakeup
        finally:
            self.remove(job_id, wakeup)

    def add(self, job_id: str, wakeup: Wakeup) -> None:
        """Have the alarm ring for this Job too. Several Jobs may ring the same one."""
        with self._changed:
            others = self._waiting.setdefault(job_id, [])
            wakeup.is_heard = wakeup.is_heard or any(other.is_heard for other in others)
            others.append(wakeup)
            self._start()
            self._changed.notify()

    def remove(self, job_id: str, wakeup: Wakeup) -> None:
        """Undo `add`."""
        with self._changed:
            self._waiting[job_id].remove(wakeup)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def close(self) -> None:
        """Close the connection. Whoever waits goes on without."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        self._redis.close()

    def _start(self) -> None:
        if self._thread is None and not self._is_closed:
            self._thread = threading.Thread(target=self._run, name="millrace-wakeups", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
            try:
                self._follow()
            except (RedisError, OSError):
                self._say_all(is_heard=False)
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed, _RETRY_S)

    def _follow(self) -> None:
        """Until nobody waits any more. Raises RedisError when the connection is lost."""
        subscribed: set[str] = set()
        with PubSub(self._redis.connection_pool) as pubsub:
            while True:
                with self._changed:
                    if not self._changed.wait_for(lambda: self._waiting or self._is_closed, _LINGER_S):
                        return
                    if self._is_closed:
                        return
                    wanted = set(self._waiting)
                if wanted - subscribed:
                    pubsub.subscribe(*map(channel, wanted - subscribed))
                if subscribed - wanted:
                    pubsub.unsubscribe(*map(channel, subscribed - wanted))  # type: ignore[no-untyped-call]
                subscribed = wanted
                message = pubsub.get_message(timeout=_TURN_S)
                while message is not None:
                    self._pass_on(message)
                    message = pubsub.get_message()

    def _pass_on(self, message: dict[str, Any]) -> None:
        if message["type"] not in ("message", "subscribe"):
            return
        job_id, chunk_ids = read_word(message)
        with self._changed:
            for wakeup in self._waiting.get(job_id, ()):
                wakeup.is_heard = True
                wakeup.ring(chunk_ids)

    def _say_all(self, *, is_heard: bool) -> None:
        with self._changed:
            for wakeups in self._waiting.values():
                for wakeup in wakeups:
                    wakeup.is_heard = is_heard
                    wakeup.ring(None)
