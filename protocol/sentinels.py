"""Sentinels: a broker URL that names no Redis but those who know which one is the master at the moment.

`sentinel://[user:password@]host[:26379][,host...]/db?master_name=NAME[&sentinel_username=...][&sentinel_password=...]`;
user and password are the master's, those of the query the Sentinels' own.
"""

from urllib.parse import parse_qsl, quote, unquote, urlsplit

import msgspec

from protocol.errors import ConfigurationError

SCHEME = "sentinel"
_PORT = 26379
_SHAPE = "sentinel://:password@host1:26379,host2:26379/0?master_name=NAME"


class Sentinels(msgspec.Struct, frozen=True, kw_only=True):
    """What the URL says."""

    hosts: list[tuple[str, int]]
    master_name: str
    database: int = 0
    username: str | None = None
    password: str | None = None
    own: dict[str, str] = {}  # username and password of the Sentinels themselves

    @property
    def celery_url(self) -> str:
        """As Celery wants it: one URL for each, the name of the master apart."""
        login = (
            "" if self.password is None else f"{quote(self.username or '', safe='')}:{quote(self.password, safe='')}@"
        )
        return ";".join(f"sentinel://{login}{host}:{port}/{self.database}" for host, port in self.hosts)

    @property
    def celery_options(self) -> dict[str, object]:
        """Of the transport, and of the result backend's."""
        return {"master_name": self.master_name, "sentinel_kwargs": dict(self.own)}


def parse_sentinels(broker_url: str) -> Sentinels | None:
    """None for a URL of another kind. Raises ConfigurationError, without the URL in it, which may hold a password."""
    if not broker_url.startswith(f"{SCHEME}://"):
        return None
    parts = urlsplit(broker_url)
    login, _, addresses = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    query = dict(parse_qsl(parts.query))
    master_name = query.pop("master_name", None)
    if not master_name:
        raise ConfigurationError(f"broker_url names Sentinels but no master: it must look like {_SHAPE}")
    own = {name.removeprefix("sentinel_"): query.pop(name) for name in list(query) if name.startswith("sentinel_")}
    if query or set(own) - {"username", "password"}:
        unknown = ", ".join(sorted([*query, *(f"sentinel_{name}" for name in set(own) - {"username", "password"})]))
        raise ConfigurationError(f"broker_url has unknown options: {unknown}; it must look like {_SHAPE}")
    try:
        hosts = [_host(address) for address in addresses.split(",")]
        database = int(parts.path.strip("/") or 0)
    except ValueError as error:
        raise ConfigurationError(f"broker_url cannot be read: it must look like {_SHAPE}") from error
    return Sentinels(
        hosts=hosts,
        master_name=master_name,
        database=database,
        username=unquote(username) or None,
        password=unquote(password) if login else None,
        own=own,
    )


def _host(address: str) -> tuple[str, int]:
    parts = urlsplit(f"//{address}")
    if not parts.hostname:
        raise ValueError(address)
    return parts.hostname, parts.port or _PORT
