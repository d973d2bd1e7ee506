"""The command line in this process: settings by environment, a working directory of the test's own."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from protocol.requests import Answer
from protocol.requests import Result as RequestResult
from storage.jobs import close_job_if_done
from storage.leases import claim_next
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit

Invoke = Callable[..., Result]
PROMPTS = '{"id": "a", "prompt": "Hello"}\nnonsense\n{"id": "c", "prompt": "Bye"}\n'


@pytest.fixture
def millrace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Call the command line with these arguments; keywords are settings."""
    from cli.main import cli

    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("MILLRACE_"):
            monkeypatch.delenv(name)

    def invoke(*arguments: str | Path, stdin: str | None = None, **settings: str) -> Result:
        environ = {f"MILLRACE_{name.upper()}": value for name, value in settings.items()}
        return CliRunner().invoke(
            cli, [str(argument) for argument in arguments], input=stdin, env=environ, prog_name="millrace"
        )

    return invoke


@pytest.fixture
def here(millrace: Invoke, database_url: str, redis_url: str, tmp_path: Path) -> Invoke:
    """The command line over this test's servers, in a folder with prompts."""
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    here = partial(millrace, database_url=database_url, broker_url=redis_url, model_name="tiny")
    assert here("migrate").exit_code == 0
    return here


@pytest.fixture
def answer(database_url: str) -> Callable[[], None]:
    """Do a worker's work on the oldest Chunk."""

    def answer() -> None:
        ledger = Ledger(database_url)
        lease = claim_next(ledger, ["tiny"], "worker", 60, min_age_s=0)
        assert lease is not None
        results = [
            RequestResult(
                line=request.line,
                custom_id=request.custom_id,
                answer=Answer(text="yes", finish_reason="stop", prompt_tokens=1, completion_tokens=3),
            )
            for request in lease.requests
        ]
        commit(ledger, [ChunkCommit(lease, results, is_finished=True)])
        close_job_if_done(ledger, lease.job_id)
        ledger.close()

    return answer
