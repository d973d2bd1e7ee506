"""What doctor asks the servers: Redis, the database, and the workers behind them."""

import os
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

from cli.finding import Finding, failed, ok, shown_bytes, warning
from protocol.settings import Settings
from storage.optional_redis import shown_broker

#: Seconds Redis, PostgreSQL and the workers each have to answer.
_REDIS_TIMEOUT_S = 3.0
_POSTGRES_TIMEOUT_S = 3
_WORKERS_TIMEOUT_S = 1.0
_MIN_REDIS = (6, 2)
_NUM_PINGS = 5
#: A ping that takes longer is felt in every message.
_SLOW_PING_S = 0.05
#: Part of maxmemory from which Redis may soon refuse what it is given.
_NEARLY_FULL = 0.9
#: Leases go by the database's clock alone, so a wrong clock here spoils only the times that people read.
_MAX_SKEW_S = 5.0
#: A write-ahead log of this size is not being folded back: some reader never ends.
_LARGE_WAL_BYTES = 1 << 30


def check_redis(settings: Settings) -> Iterator[Finding]:
    """Reachable, new enough, keeping what it is given, and how long the queue is."""
    from redis.exceptions import RedisError

    from protocol.celery_app import chunk_queues
    from storage.optional_redis import connect, translated

    shown = shown_broker(settings.broker_url)
    timeouts = {"socket_timeout": _REDIS_TIMEOUT_S, "socket_connect_timeout": _REDIS_TIMEOUT_S}
    with connect(settings.broker_url, **timeouts) as client:
        try:
            pings = [_timed_ping(client) for _ in range(_NUM_PINGS)]
            info: dict[str, Any] = client.info()
            waiting = ", ".join(f"{queue} {client.llen(queue)}" for queue in chunk_queues(*settings.served_models))
            lengths = f"{waiting}, unacked {client.hlen('unacked')}"
        except (RedisError, OSError) as error:
            reason, _, way_out = str(translated(error, settings.broker_url)).rpartition("; ")
            yield failed("redis", reason, way_out)
            return
    version = str(info["redis_version"])
    latency_s = statistics.median(pings)
    facts = f"{version} at {shown}, ping {latency_s * 1000:.1f} ms"
    if tuple(int(part) for part in version.split(".")[:2]) < _MIN_REDIS:
        yield failed("redis", facts, "upgrade it: Millrace needs Redis 6.2 or newer")
    elif latency_s > _SLOW_PING_S:
        yield warning("redis", facts, "bring Redis nearer to this machine, or look at what else loads it")
    else:
        yield ok("redis", facts)
    yield _memory_of_redis(info)
    yield ok("queues", lengths)


def _memory_of_redis(info: dict[str, Any]) -> Finding:
    limit, used, policy = int(info["maxmemory"]), int(info["used_memory"]), str(info["maxmemory_policy"])
    facts = f"{shown_bytes(used)} used of {shown_bytes(limit) if limit else 'no limit'}, policy {policy}"
    if limit and policy.startswith("allkeys"):
        way_out = "set maxmemory-policy noeviction: this one throws queues away when memory is short"
        return warning("redis memory", facts, way_out)
    if limit and used > limit * _NEARLY_FULL:
        return warning("redis memory", facts, "raise maxmemory, or lower MILLRACE_ANSWERS_MAX_BYTES")
    return ok("redis memory", facts)


def _timed_ping(client: Any) -> float:
    start = time.perf_counter()
    client.ping()
    return time.perf_counter() - start


def check_database(settings: Settings) -> Iterator[Finding]:
    """Reachable, the schema's version, writable; size, version, clock."""
    from sqlalchemy import make_url

    from storage.ledger import Ledger

    settings.check_topology()
    ledger = Ledger(settings.database_url)
    if ledger.url.get_backend_name() == "postgresql" and "connect_timeout" not in ledger.url.query:
        ledger.close()
        url = make_url(settings.database_url).update_query_dict({"connect_timeout": str(_POSTGRES_TIMEOUT_S)})
        ledger = Ledger(url.render_as_string(hide_password=False))
    try:
        yield from _check_ledger(ledger)
    finally:
        ledger.close()


def _check_ledger(ledger: Any) -> Iterator[Finding]:
    from sqlalchemy import false, func, select, text, update

    from storage.clock import now
    from storage.tables import chunks, jobs

    ledger.check_schema()
    is_postgres = ledger.url.get_backend_name() == "postgresql"
    # Changes nothing, but only those who may write get as far as that.
    ledger.write(lambda connection: connection.execute(update(jobs).where(false()).values(state=jobs.c.state)))
    statement = "SHOW server_version" if is_postgres else "SELECT sqlite_version()"
    version = ledger.read(lambda connection: connection.execute(text(statement)).scalar_one())
    by_state = select(jobs.c.state, func.count()).group_by(jobs.c.state)
    states = ledger.read(lambda connection: dict(connection.execute(by_state).all()))
    shown = ledger.url.set(query={}).render_as_string(hide_password=True)
    kind = "PostgreSQL" if is_postgres else "SQLite"
    yield ok("database", f"{kind} {version} at {shown}, tables up to date, writable")
    num_unclaimed = ledger.read(
        lambda connection: connection.execute(
            select(func.count()).select_from(chunks).where(chunks.c.state == "waiting")
        ).scalar_one()
    )
    counts = ", ".join(f"{number:,} {state}" for state, number in sorted(states.items())) or "none"
    yield ok("jobs", f"{counts}; {num_unclaimed:,} Chunks wait for a worker")
    if is_postgres:
        size = "SELECT pg_database_size(current_database())"
        num_bytes = ledger.read(lambda connection: connection.execute(text(size)).scalar_one())
        yield ok("database size", shown_bytes(num_bytes))
        before = time.time()
        theirs = ledger.read(lambda connection: connection.execute(select(now())).scalar_one())
        yield _skew(theirs - (before + time.time()) / 2)
    else:
        yield _sqlite_files(str(ledger.url.database))


def _skew(skew_s: float) -> Finding:
    shown = round(skew_s, 1) or 0.0  # never -0.0
    facts = f"the database's is {shown:+.1f} s from this machine's"
    if abs(skew_s) > _MAX_SKEW_S:
        return warning("clock", facts, "let both machines follow the same time server (NTP)")
    return ok("clock", facts)


def _sqlite_files(path: str) -> Finding:
    wal = f"{path}-wal"
    wal_bytes = os.path.getsize(wal) if os.path.exists(wal) else 0
    facts = f"{shown_bytes(os.path.getsize(path))}, write-ahead log {shown_bytes(wal_bytes)}"
    if wal_bytes > _LARGE_WAL_BYTES:
        return warning("database size", facts, "end the process that keeps reading: the log cannot be folded back")
    return ok("database size", facts)


def check_workers(settings: Settings) -> Iterator[Finding]:
    """Who answers a ping through Redis, whatever model they serve."""
    names = _answering(settings, None)
    if names is None:
        yield failed("workers", "nobody can be asked without Redis")
    elif names:
        answering = "1 worker answers" if len(names) == 1 else f"{len(names)} workers answer"
        yield ok("workers", f"{answering}: {', '.join(names)}")
    else:
        way_out = "start one with `millrace worker`; what is submitted meanwhile waits in the database"
        yield warning("workers", "none answers", way_out)


def check_own_worker(settings: Settings) -> Iterator[Finding]:
    """Whether the loop of a worker on this machine answers through Redis: what a container's health is."""
    pattern = f"{settings.served_model}@{socket.gethostname()}-*"
    names = _answering(settings, pattern)
    if names is None:
        yield failed("worker", f"cannot be asked: Redis at {shown_broker(settings.broker_url)} does not answer")
    elif names:
        yield ok("worker", f"answers: {', '.join(names)}")
    else:
        way_out = "look into its log; while the model is being loaded this is as it should be"
        yield failed("worker", f"none named {pattern} answers", way_out)


def _answering(settings: Settings, pattern: str | None) -> list[str] | None:
    """The names of workers whose loop answers; None where Redis does not."""
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from protocol.celery_app import make_app

    with make_app(settings) as app:
        timeouts = {"socket_timeout": _REDIS_TIMEOUT_S, "socket_connect_timeout": _REDIS_TIMEOUT_S}
        app.conf.broker_transport_options |= timeouts
        matching = {} if pattern is None else {"pattern": pattern, "matcher": "glob"}
        try:
            with app.connection_for_write() as connection:
                connection.connect()
                replies = app.control.broadcast(
                    "ping", reply=True, timeout=_WORKERS_TIMEOUT_S, connection=connection, **matching
                )
        except (OperationalError, RedisError, OSError):
            return None
    return sorted(name for reply in replies or () for name in reply)
