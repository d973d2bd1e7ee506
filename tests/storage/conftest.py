"""Ledgers on one kind of database, for what is particular to it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.ledger import Ledger

OpenLedger = Callable[[str], Ledger]


@pytest.fixture
def sqlite_ledger(tmp_path: Path, open_ledger: OpenLedger) -> Ledger:
    ledger = open_ledger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.migrate()
    return ledger


@pytest.fixture
def postgres_ledger(postgres_url: str, open_ledger: OpenLedger) -> Ledger:
    return open_ledger(postgres_url)
