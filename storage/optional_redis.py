"""OptionalRedis: the queue's Redis, for what may get lost: when it does not answer, it counts as absent for a while."""

import contextlib
import logging
import ssl
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from redis.sentinel import Sentinel

from protocol.errors import BrokerUnavailable, ConfigurationError
from protocol.sentinels import parse_sentinels

T = TypeVar("T")

#: Seconds without Redis after it failed: each try may cost a whole socket timeout, which the engine would wait for.
_PAUSE_S = 5.0
#: Seconds a command may take: whatever it is for is in SQL too, so waiting longer never pays.
_TIMEOUT_S = 2.0
_NO_CLUSTER = (
    "MILLRACE_BROKER_URL names a node of a Redis Cluster, which Celery's queues cannot use: their commands take "
    "several keys, which a cluster keeps on different nodes. Use a single Redis, or one with replicas behind Sentinel "
    "(sentinel://host:26379/0?master_name=NAME): the queue is small, since the database keeps everything"
)


def connect(broker_url: str, **options: Any) -> Redis:
    """A client of the queue's own Redis, returning bytes; `broker_url` as Celery takes it. Connects to nothing yet."""
    options = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S, **options}
    timeouts = {name: options[name] for name in ("socket_timeout", "socket_connect_timeout")}
    sentinels = parse_sentinels(broker_url)
    if sentinels is not None:
        login = {"username": sentinels.username, "password": sentinels.password, "db": sentinels.database}
        own: dict[str, Any] = {**timeouts, **sentinels.own}
        found: Any = cast(Any, Sentinel)(sentinels.hosts, sentinel_kwargs=own)
        master: Redis = found.master_for(sentinels.master_name, **login, **options)
        return master
    # Celery has its own name for a Unix socket.
    url = broker_url.replace("redis+socket://", "unix://", 1)
    redis: Redis = Redis.from_url(url, **options)
    return redis


def shown_broker(broker_url: str) -> str:
    """Without login and options, which may hold passwords too, as it may be shown."""
    parts = urlsplit(broker_url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def check_login(broker_url: str) -> None:
    """Raises ConfigurationError when Redis refuses the login or is a cluster, BrokerUnavailable when it is away."""
    with connect(broker_url) as redis:
        try:
            redis.ping()
            # Whoever may not ask is believed.
            with contextlib.suppress(NoPermissionError):
                is_cluster = redis.info("cluster").get("cluster_enabled") == 1
                if is_cluster:
                    raise ConfigurationError(_NO_CLUSTER)
        except RedisError as error:
            raise translated(error, broker_url) from error


def translated(error: Exception, broker_url: str) -> ConfigurationError | BrokerUnavailable:
    """Our error for one of the queue's Redis, also one that Celery has wrapped."""
    shown = shown_broker(broker_url)
    cause: BaseException | None = error
    way_out = "start it, or set MILLRACE_BROKER_URL to where it runs"
    while cause is not None:
        if isinstance(cause, AuthenticationError | NoPermissionError):
            return ConfigurationError(
                f"Redis at {shown} refuses the login: {cause}; set user and password in MILLRACE_BROKER_URL"
            )
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ConfigurationError(
                f"Redis at {shown} shows a certificate that is not trusted: {cause.verify_message}; in "
                "MILLRACE_BROKER_URL name the CA that signed it, with ssl_ca_certs=/path/to/ca.pem, and the host as "
                "it does"
            )
        if isinstance(cause, ssl.SSLError):
            way_out = (
                "set ssl_certfile and ssl_keyfile in MILLRACE_BROKER_URL to a client certificate that it trusts, or "
                "redis:// where it speaks no TLS"
            )
            break
        cause = cause.__cause__ or cause.__context__
    return BrokerUnavailable(f"Redis at {shown} does not answer: {error}; {way_out}")


class OptionalRedis:
    """Thread-safe. `absent` and `present` are what the log says when Redis goes and comes back."""

    def __init__(
        self,
        redis: Redis,
        log: logging.Logger,
        *,
        absent: str,
        present: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.redis = redis
        self._log = log
        self._absent, self._present = absent, present
        self._clock = clock
        self._is_absent = False
        self._absent_until = 0.0

    def call(self, command: Callable[[], T], otherwise: T) -> T:
        """What the command returns, or `otherwise` where Redis cannot be asked."""
        if self._is_absent and self._clock() < self._absent_until:
            return otherwise
        try:
            reply = command()
        except (RedisError, OSError) as error:
            self._absent_until = self._clock() + _PAUSE_S
            if not self._is_absent:
                self._log.warning("%s: %s", self._absent, error)
            self._is_absent = True
            return otherwise
        if self._is_absent:
            self._log.info("%s", self._present)
            self._is_absent = False
        return reply
