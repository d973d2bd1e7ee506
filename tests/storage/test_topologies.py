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
from functools import cache
from pathlib import Path

import msgspec
import pytest
import redis

from producer.doorbell import Doorbell
from protocol.celery_app import bulk_queue, make_app
from protocol.errors import BrokerUnavailable, ConfigurationError
from protocol.settings import Settings, load_settings
from storage.flights import Flights
from storage.optional_redis import check_login, connect, shown_broker
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


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA (ca.pem), what it signed for the server and a client, and another CA (other.pem)."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "names").write_text("subjectAltName=DNS:localhost")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for name in ("ca", "other"):
        openssl(
            "req", "-x509", *key, "-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"
        )
    for name in ("server", "client"):
        openssl("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ["-in", f"{name}.csr", "-days", "2", "-extfile", "names", "-out", f"{name}.pem"]
        openssl("x509", "-req", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", *signed)
    return folder


@contextmanager
def tls_server(folder: Path, certificates: Path, *, wants_client: bool) -> Iterator[str]:
    """Where a Redis with a password speaks TLS: itself, or where it is built without, somebody else before it."""
    lines = [f"tls-cert-file {certificates}/server.pem", f"tls-key-file {certificates}/server.key"]
    lines += [f"tls-ca-cert-file {certificates}/ca.pem", f"tls-auth-clients {'yes' if wants_client else 'no'}"]
    with ExitStack() as stack:
        if speaks_tls():
            port = free_port()
            stack.enter_context(server(folder, "requirepass secret", f"tls-port {port}", *lines))
        else:
            plain = stack.enter_context(server(folder, "requirepass secret"))
            port = stack.enter_context(tls_in_front_of(plain, certificates, wants_client=wants_client))
        yield f"localhost:{port}/0"


@cache
def speaks_tls() -> bool:
    """Whether this Redis is built with it: then it asks for a certificate, and otherwise does not know the word."""
    said = subprocess.run([find_redis_server(), "--tls-port", "1", "--port", "0"], capture_output=True, text=True)
    return "tls-cert-file" in said.stdout


def test_tls_is_spoken_and_the_servers_certificate_is_checked(certificates: Path, tmp_path: Path) -> None:
    with tls_server(tmp_path, certificates, wants_client=False) as address:
        url = f"rediss://:secret@{address}?ssl_cert_reqs=required&ssl_ca_certs={certificates}"
        check_everything_works(f"{url}/ca.pem")
        with pytest.raises(ConfigurationError) as refused:
            check_login(f"{url}/other.pem")
        assert str(refused.value) == (
            f"Redis at rediss://{address} shows a certificate that is not trusted: self-signed certificate in "
            "certificate chain; in MILLRACE_BROKER_URL name the CA that signed it, with ssl_ca_certs=/path/to/ca.pem, "
            "and the host as it does"
        )
        with pytest.raises(ConfigurationError, match=r"not trusted: IP address mismatch"):
            check_login(f"{url}/ca.pem".replace("localhost", "127.0.0.1"))


def test_a_client_shows_its_own_certificate_where_the_server_wants_one(certificates: Path, tmp_path: Path) -> None:
    with tls_server(tmp_path, certificates, wants_client=True) as address:
        url = f"rediss://:secret@{address}?ssl_cert_reqs=required&ssl_ca_certs={certificates}/ca.pem"
        check_everything_works(f"{url}&ssl_certfile={certificates}/client.pem&ssl_keyfile={certificates}/client.key")
        for unknown in ("", f"&ssl_certfile={certificates}/other.pem&ssl_keyfile={certificates}/other.key"):
            with pytest.raises(BrokerUnavailable) as refused:
                check_login(url + unknown)
            assert "\n" not in str(refused.value)
            assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("rediss://h:1/0", "has no ssl_cert_reqs, .* it must be one of required, optional, none"),
        ("rediss://h:1/0?ssl_cert_reqs=CERT_REQUIRED", "ssl_cert_reqs=CERT_REQUIRED"),
        ("rediss://h:1/0?ssl_cert_reqs=required&ssl_ca=x", "unknown options: ssl_ca; those of TLS are ssl_cert_reqs"),
        ("rediss://h:1/0?ssl_cert_reqs=required&ssl_ca_certs=/nowhere/ca.pem", "/nowhere/ca.pem, and there is no such"),
        ("redis://h:1/0?ssl_cert_reqs=required", "ssl_cert_reqs and is of the kind redis, which speaks no TLS"),
    ],
)
def test_a_tls_url_that_cannot_work_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        load_settings({"broker_url": url}, environ={})


@contextmanager
def tls_in_front_of(port: int, certificates: Path, *, wants_client: bool) -> Iterator[int]:
    """The bundled Redis is built without TLS: somebody else speaks it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    if wants_client:
        context.load_verify_locations(certificates / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
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
            assert "own" not in shown_broker(url)
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
