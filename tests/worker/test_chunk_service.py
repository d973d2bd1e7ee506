"""The life of Chunks against a real engine: cancelled, late, given back."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from producer.client import Client
from storage.jobs import cancel_job
from storage.ledger import Ledger
from tests.tiny_model import build_tiny_model
from tests.worker.service import hand_over, running_service, service_settings, submit, wait_until
from worker.chunk_service import ChunkService

#: Far more than the engine does during a test.
LONG = [{"prompt": f"the worker pulls {i}"} for i in range(200)]
LONG_PARAMS = {"max_tokens": 480, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def system(
    tmp_path_factory: pytest.TempPathFactory, redis_server: str
) -> Iterator[tuple[ChunkService, Client, Ledger]]:
    folder = tmp_path_factory.mktemp("service")
    model = build_tiny_model(folder / "tiny")
    settings = service_settings(model, redis_server, f"sqlite:///{folder}/ledger.db")
    with closing(Ledger(settings.database_url)) as ledger:
        ledger.migrate()
        with running_service(settings) as service, Client(settings) as client:
            yield service, client, ledger


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
