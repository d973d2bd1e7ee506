"""Ledgers on one kind of database, for what is particular to it."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from storage.ledger import Ledger
from tests.conftest import PostgresCluster
from tests.storage.lossy_proxy import LossyProxy

OpenLedger = Callable[[str], Ledger]


@pytest.fixture
def sqlite_ledger(tmp_path: Path, open_ledger: OpenLedger) -> Ledger:
    ledger = open_ledger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.migrate()
    return ledger


@pytest.fixture
def postgres_ledger(postgres_url: str, open_ledger: OpenLedger) -> Ledger:
    return open_ledger(postgres_url)


@pytest.fixture
def lossy_proxy(postgres_cluster: PostgresCluster) -> Iterator[LossyProxy]:
    # Not in tmp_path: a socket's path must be shorter than 108 bytes.
    with tempfile.TemporaryDirectory(prefix="millrace-proxy-") as folder:
        proxy = LossyProxy(Path(folder), postgres_cluster.folder, postgres_cluster.port)
        yield proxy
        proxy.close()


@pytest.fixture
def lossy_ledger(lossy_proxy: LossyProxy, postgres_url: str, open_ledger: OpenLedger) -> Ledger:
    """A PostgreSQL ledger behind the proxy."""
    url = make_url(postgres_url).update_query_dict({"host": str(lossy_proxy.folder)})
    return open_ledger(url.render_as_string(hide_password=False))
