"""Ways to reach a Redis: with a login, as a user of ACL, by TLS, by Sentinels; and a cluster, which is refused.

Each over real servers, with what Celery does and what redis-py does.
"""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import msgspec
import pytest
import redis

from producer.doorbell import Doorbell
from protocol.celery_app import bulk_queue, make_app
from protocol.errors import ConfigurationError
from protocol.settings import Settings, load_settings
from storage.flights import Flights
from storage.optional_redis import check_login, connect
from tests.conftest import free_port
from worker.local.redis_server import find_redis_server

# Celery stores results with it.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")


@contextmanager
def server(folder: Path, *lines: str, mode: tuple[str, ...] = ()) -> Iterator[int]:
    """A Redis, or what else its program can be, on a port of its own."""
    # A cluster's nodes also listen 10,000 ports above.
    port = next(port for port in iter(free_port, None) if port < 55_000)
    config = folder / f"{port}.conf"
    config.write_text("\n".join([f"port {port}", "bind 127.0.0.1", f"dir {folder}", 'save ""', *lines]) + "\n")
    if mode:
        config.write_text(config.read_text().replace('save ""\n', ""))
    process = subprocess.Popen([find_redis_server(), config, *mode], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not _listens(port):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_everything_works(broker_url: str) -> None:
    """A Chunk's message there and back, a result of Celery's, and a script of redis-py's."""
    settings = load_settings({"broker_url": broker_url, "model_name": "tiny"}, environ={})
    check_login(broker_url)
    with make_app(settings) as app, closing(Doorbell(settings)) as bell:
        bell.ring(17, "tiny", "bulk")
        with app.connection_for_read() as connection:
            message = connection.default_channel.basic_get(bulk_queue("tiny"))
            assert msgspec.msgpack.decode(message.body)[0] == [17]
            connection.default_channel.basic_ack(message.delivery_tag)
        app.backend.store_result("a-task", "64 ok", "SUCCESS")
        assert app.backend.get_result("a-task") == "64 ok"
    with connect(broker_url) as client:
        assert client.ping()
    with closing(Flights.connect(broker_url, "one")) as one, closing(Flights.connect(broker_url, "two")) as two:
        one.beat()
        assert (one.claim([b"k"]), two.claim([b"k"])) == (set(), {b"k"})
        one.release([b"k"])


def test_a_password_and_a_user_of_acl_are_taken_from_the_url(redis_server: str, tmp_path: Path) -> None:
    check_everything_works(redis_server)
    with redis.Redis.from_url(redis_server) as admin:
        admin.execute_command("ACL", "SETUSER", "millrace", "on", ">p@ss/word", "~*", "&*", "+@all", "-@dangerous")
    address = redis_server.rpartition("@")[2]
    check_everything_works(f"redis://millrace:p%40ss%2Fword@{address}")
    with pytest.raises(ConfigurationError, match="refuses the login"):
        check_login(f"redis://millrace:wrong@{address}")


def test_tls_is_spoken_and_certificates_are_checked(redis_server: str, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    for name in ("own", "other"):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    login, _, address = redis_server.removeprefix("redis://").rpartition("@")
    with tls_in_front_of(int(address.split(":")[1].split("/")[0]), tmp_path / "own.pem", tmp_path / "own.key") as port:
        url = f"rediss://{login}@localhost:{port}/0?ssl_cert_reqs=required&ssl_ca_certs={tmp_path}"
        check_everything_works(f"{url}/own.pem")
        with pytest.raises(Exception, match=r"certificate verify failed|CERTIFICATE_VERIFY_FAILED"):
            check_login(f"{url}/other.pem")


@contextmanager
def tls_in_front_of(port: int, certificate: Path, key: Path) -> Iterator[int]:
    """The bundled Redis is built without TLS: somebody else speaks it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        for each in (source, target):
            with ExitStack() as stack:
                stack.callback(each.close)

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                outer = context.wrap_socket(plain, server_side=True)
            except OSError:
                plain.close()
                continue
            inner = socket.create_connection(("127.0.0.1", port))
            for pair in ((outer, inner), (inner, outer)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def test_sentinels_say_where_the_master_is(tmp_path: Path) -> None:
    with server(tmp_path, "requirepass secret") as master:
        watched = [f"sentinel monitor mymaster 127.0.0.1 {master} 1", "sentinel auth-pass mymaster secret"]
        with server(tmp_path, *watched, "requirepass own", mode=("--sentinel",)) as first:
            url = f"sentinel://:secret@127.0.0.1:{first}/0?master_name=mymaster&sentinel_password=own"
            check_everything_works(url)
            # A Sentinel that is away is passed over.
            check_everything_works(url.replace("@", f"@127.0.0.1:{free_port()},"))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sentinel://host:26379/0", "no master"),
        ("sentinel://host:26379/0?master_name=m&quorum=2", "unknown options: quorum"),
        ("sentinel://host:port/0?master_name=m", "cannot be read"),
    ],
)
def test_a_sentinel_url_that_cannot_work_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        load_settings({"broker_url": url}, environ={})


def test_sqlite_is_refused_with_sentinels_elsewhere() -> None:
    url = "sentinel://127.0.0.1:26379,elsewhere:26379/0?master_name=m"
    with pytest.raises(ConfigurationError, match="elsewhere"):
        Settings(broker_url=url).check_topology()


def test_a_cluster_is_refused_with_the_reason(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigurationError, match="Redis Cluster, which Celery's queues cannot use")
    with server(tmp_path, "cluster-enabled yes") as port, refused:
        check_login(f"redis://127.0.0.1:{port}/0")
