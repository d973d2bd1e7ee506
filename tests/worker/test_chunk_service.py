"""The life of Chunks against a real engine: cancelled, late, given back."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from producer.client import Client
from protocol.errors import DatabaseUnavailable, DeadLetterNotFound
from protocol.faults import FAULT_VARIABLE
from protocol.requests import Request
from storage.jobs import cancel_job, job_status
from storage.ledger import Ledger
from tests.processes import Watched, command_line, descendants
from tests.tiny_model import build_tiny_model
from tests.worker.service import hand_over, running_service, service_settings, submit, wait_until
from worker import chunk_service
from worker.chunk_service import ChunkService
from worker.open_chunk import OpenChunk
from worker.text import Tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

#: Far more than the engine does during a test.
LONG = [{"prompt": f"the worker pulls {i}"} for i in range(200)]
LONG_PARAMS = {"max_tokens": 480, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def system(
    tmp_path_factory: pytest.TempPathFactory, redis_server: str
) -> Iterator[tuple[ChunkService, Client, Ledger]]:
    folder = tmp_path_factory.mktemp("service")
    model = build_tiny_model(folder / "tiny")
    settings = service_settings(
        model, redis_server, f"sqlite:///{folder}/ledger.db", engine_hang_seconds=2.0, drain_seconds=0.0
    )
    with closing(Ledger(settings.database_url)) as ledger, pytest.MonkeyPatch.context() as patch:
        ledger.migrate()
        # The first engine is killed while it loads, which must cost nothing but time.
        (folder / "fault").touch()
        patch.setenv(FAULT_VARIABLE, f"kill:engine load:1:{folder}/fault")
        with running_service(settings) as service, Client(settings) as client:
            assert not (folder / "fault").exists()
            yield service, client, ledger


@pytest.fixture
def next_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the engine replaced by one with this fault; nothing for none."""

    def replace(fault: str) -> None:
        monkeypatch.setenv(FAULT_VARIABLE, fault)
        engines = [pid for pid in descendants(os.getpid()) if "worker.engine.process" in command_line(pid)]
        with Watched(engines) as watched:
            watched.kill()

    return replace


def running(service: ChunkService) -> int:
    """Sequences that the engine owes."""
    count = service.info()["running"]
    assert isinstance(count, int)
    return count


def test_a_cancelled_job_leaves_the_engine_at_once_and_its_results_stay(
    system: tuple[ChunkService, Client, Ledger],
) -> None:
    service, client, ledger = system
    job = submit(client, "cancelled", [{"prompt": "a", "max_tokens": 1}, *LONG], **LONG_PARAMS)
    tickets = hand_over(service, ledger, job)
    wait_until(lambda: client.status(job).num_ok >= 1 and running(service) > 20)

    assert cancel_job(ledger, job.id)
    # The leases run for another ten minutes.
    wait_until(lambda: running(service) == 0)

    status = client.status(job)
    assert (status.job.state, status.num_requests_leased) == ("cancelled", 0)
    assert len(list(client.results(job))) == status.num_ok >= 1
    wait_until(lambda: all(ticket.outcome is not None for ticket in tickets))
    # Whoever comes next gets the whole engine.
    following = submit(client, "following", [{"prompt": "b"}], max_tokens=4, temperature=0.0)
    hand_over(service, ledger, following)
    assert client.wait(following).num_ok == 1


def test_a_job_that_no_message_tells_of_is_found_in_the_ledger(
    system: tuple[ChunkService, Client, Ledger], caplog: pytest.LogCaptureFixture
) -> None:
    service, _, _ = system
    with Client(msgspec.structs.replace(service.settings, broker_url="redis://127.0.0.1:1/0")) as client:
        job = submit(client, "untold", [{"prompt": "nobody rings"}], max_tokens=4, temperature=0.0)
        (warning,) = (message for message in caplog.messages if "goes into the ledger all the same" in message)
        assert warning.startswith("Redis at redis://127.0.0.1:1/0 does not answer")
        assert client.wait(job, timeout_s=60).num_ok == 1


def test_what_is_late_becomes_an_error_and_the_rest_goes_on(system: tuple[ChunkService, Client, Ledger]) -> None:
    service, client, ledger = system
    patient = {"prompt": "the patient one", "max_tokens": 2, "timeout": 3600}
    job = submit(client, "late", [*LONG, patient], **LONG_PARAMS, timeout=1.5)
    hand_over(service, ledger, job)

    status = client.wait(job)

    assert running(service) == 0
    results = list(client.results(job))
    codes = {result.failure.code for result in results if result.failure is not None}
    assert codes == {"deadline_exceeded"}
    assert (len(results), status.job.state) == (len(LONG) + 1, "finished")
    assert results[-1].answer is not None
    assert "timeout=1.5 seconds" in next(r.failure.message for r in results if r.failure is not None)
    # A Chunk that comes too late is not computed at all.
    too_late = submit(client, "too late", [{"prompt": "a"}], timeout=0.001)
    before = service.info()["computed_tokens"]
    hand_over(service, ledger, too_late)
    assert client.wait(too_late).num_error == 1
    assert service.info()["computed_tokens"] == before


def test_a_renewal_that_failed_is_tried_again_long_before_the_next_one(
    tmp_path: Path, redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = service_settings(tmp_path, redis_server, f"sqlite:///{tmp_path}/ledger.db", lease_seconds=30.0)
    service = ChunkService(settings, tmp_path, on_credit=lambda: None, on_fatal=pytest.fail)
    service._open[1] = cast("OpenChunk", SimpleNamespace(lease=SimpleNamespace(chunk_id=1, attempt=1), num_owed=1))
    answers: list[set[int] | None] = [{1}, None, None, {1}]
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) > 4

    def renew(ledger: Ledger, owner: str, held: dict[int, int], lease_s: float) -> set[int]:
        if (answer := answers.pop(0)) is None:
            raise DatabaseUnavailable("the database does not answer")
        return answer

    monkeypatch.setattr(service._is_stopping, "wait", wait)
    monkeypatch.setattr(chunk_service, "renew", renew)
    service._renew()

    assert waits == [10.0, 10.0, 1.0, 1.0, 10.0]


def test_what_is_late_of_a_model_that_nobody_serves_ends_too(system: tuple[ChunkService, Client, Ledger]) -> None:
    service, _, ledger = system
    # The client does not look, so the worker has done it.
    with Client(msgspec.structs.replace(service.settings, model_name="another")) as client:
        job = submit(client, "unserved", [{"prompt": "a"}, {"prompt": "b"}], timeout=0.001)
    wait_until(lambda: job_status(ledger, job.id).job.state == "finished")
    assert job_status(ledger, job.id).num_error == 2


def test_a_hung_engine_is_killed_and_what_it_owed_is_computed_by_the_next(
    system: tuple[ChunkService, Client, Ledger], next_engine: Callable[[str], None], tmp_path: Path
) -> None:
    service, client, ledger = system
    (tmp_path / "fault").touch()
    next_engine(f"stop:engine step:3:{tmp_path}/fault")
    job = submit(client, "hung", [{"prompt": f"hung {i}"} for i in range(4)], max_tokens=8, temperature=0.0)
    hand_over(service, ledger, job)

    status = client.wait(job)

    assert (status.num_ok, status.num_error) == (4, 0)
    assert not (tmp_path / "fault").exists()


def test_the_one_that_kills_engines_becomes_a_dead_letter_that_can_be_replayed(
    system: tuple[ChunkService, Client, Ledger], next_engine: Callable[[str], None]
) -> None:
    service, client, ledger = system
    next_engine("kill:end of 13 tokens:1")
    lines = [{"prompt": f"innocent {i}", "max_tokens": 20 + i} for i in range(3)]
    lines.insert(1, {"prompt": "poison", "max_tokens": 13, "n": 1})
    job = submit(client, "poison", lines, temperature=0.0, ignore_eos=True)
    hand_over(service, ledger, job)

    status = client.wait(job)

    assert (status.num_ok, status.num_error) == (3, 1)
    (letter,) = client.dead_letters(job)
    assert (letter.line, letter.code) == (2, "engine_died")
    assert "the last time with nothing else" in letter.reason
    letters, request = client.dead_letter(job, 2)
    assert (letters, request.prompt) == ([letter], "poison")
    assert client.verify(job).holds

    # The cause is gone.
    next_engine("")
    assert client.replay(job, [1]) == 0
    assert client.replay(job) == 1
    assert client.dead_letters() == []
    hand_over(service, ledger, job)
    assert client.wait(job).num_ok == 4
    assert client.verify(job).holds
    with pytest.raises(DeadLetterNotFound):
        client.dead_letter(job, 2)


def test_two_workers_compute_equal_requests_once_and_cancelling_one_job_leaves_the_other(
    system: tuple[ChunkService, Client, Ledger], next_engine: Callable[[str], None]
) -> None:
    service, client, ledger = system
    lines = [{"prompt": f"both {i}"} for i in range(12)]
    params = {"max_tokens": 300, "temperature": 0.0, "ignore_eos": True}
    with running_service(service.settings) as other:
        first, second = (submit(client, name, lines, **params) for name in ("first", "second"))
        hand_over(service, ledger, first)
        wait_until(lambda: running(service) == 12)
        hand_over(other, ledger, second)

        statuses = [client.wait(first), client.wait(second)]

        assert [status.num_ok for status in statuses] == [12, 12]
        assert [status.num_cached for status in statuses] == [0, 12]
        assert other.info()["computed_tokens"] == 0

        third, fourth = (submit(client, name, lines, **params | {"max_tokens": 400}) for name in ("third", "fourth"))
        hand_over(service, ledger, third)
        wait_until(lambda: running(service) == 12)
        hand_over(other, ledger, fourth)
        wait_until(lambda: other.info()["followers"] == 12)
        assert running(other) == 0
        client.cancel(third)
        assert client.wait(fourth).num_ok == 12
        assert client.status(third).num_ok < 12


def test_a_fault_of_ours_costs_its_request_alone_after_one_retry(
    system: tuple[ChunkService, Client, Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, client, ledger = system
    encode, num_faults = Tokenizer.encode, 0

    def faulty(self: Tokenizer, requests: list[Request], *limits: Any) -> object:
        nonlocal num_faults
        if any(request.prompt == "the bug" for request in requests):
            num_faults += 1
            raise ZeroDivisionError("as if it were")
        return encode(self, requests, *limits)

    monkeypatch.setattr(Tokenizer, "encode", faulty)
    lines = [{"prompt": "sound"}, {"prompt": "the bug"}, {"prompt": "sound too"}]
    job = submit(client, "our fault", lines, max_tokens=2, temperature=0.0)
    hand_over(service, ledger, job)

    status = client.wait(job)

    assert (status.num_ok, status.num_error, num_faults) == (2, 1, 2)
    (letter,) = client.dead_letters(job)
    assert (letter.line, letter.code) == (2, "internal_error")
    assert "ZeroDivisionError" in letter.reason
