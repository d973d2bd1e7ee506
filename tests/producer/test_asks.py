"""One prompt at a time, from many who wait."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager

import msgspec
import pytest
from sqlalchemy import select

from producer.client import Client
from protocol.errors import InvalidRequest, JobNotFound, TimedOut
from protocol.requests import Failure, Result
from protocol.sampling import SamplingParams
from protocol.settings import Settings
from storage.jobs import cancel_job, close_job_if_done
from storage.landing_channel import LandingChannel
from storage.leases import Lease, claim_next
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit
from storage.tables import chunks, jobs
from tests.producer.conftest import MODEL, NOBODY_LISTENS, answered, lines_of
from tests.storage.samples import num_rows

#: Seconds after which a test that waits has failed.
_LONG_S = 60.0


@contextmanager
def worker(
    ledger: Ledger, redis_url: str, answer: Callable[[Lease], list[Result]] | None = None
) -> Iterator[list[Lease]]:
    """Answers every prompt with itself and an exclamation mark; yields what it has claimed."""
    claimed: list[Lease] = []
    is_over = threading.Event()
    landings = LandingChannel.connect(redis_url)

    def work() -> None:
        while not is_over.wait(0.005):
            while (lease := claim_next(ledger, [MODEL], "worker", 60, min_age_s=0)) is not None:
                claimed.append(lease)
                results = [answered(request) for request in lease.requests] if answer is None else answer(lease)
                commit(ledger, [ChunkCommit(lease, results, is_finished=True)])
                landings.publish({lease.job_id: [lease.chunk_id]})
                close_job_if_done(ledger, lease.job_id)

    with ThreadPoolExecutor() as pool:
        working = pool.submit(work)
        try:
            yield claimed
        finally:
            is_over.set()
            working.result(_LONG_S)
            landings.close()


def text(result: Result) -> str | None:
    return None if result.answer is None else result.answer.text


def test_each_of_many_threads_gets_its_own_answer_and_they_share_jobs(
    client: Client, ledger: Ledger, redis_url: str
) -> None:
    with worker(ledger, redis_url) as claimed, ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(client.ask, f"p{number}", timeout_s=_LONG_S) for number in range(200)]
        assert [text(each.result(_LONG_S)) for each in asked] == [f"p{number}!" for number in range(200)]

    assert sum(len(lease.requests) for lease in claimed) == 200
    assert len(claimed) <= 100
    assert client.jobs() == []
    (asked_job,) = {client.status(lease.job_id).job.state for lease in claimed}
    assert asked_job == "finished"
    assert lines_of(client.results(claimed[0].job_id)) == list(range(1, len(claimed[0].requests) + 1))


def test_prompts_with_other_parameters_are_in_other_jobs(client: Client, ledger: Ledger, redis_url: str) -> None:
    cold, warm = SamplingParams(temperature=0), SamplingParams(temperature=1, seed=7)
    # All before anybody works, so that they have the chance to meet.
    futures = [client.ask_future(f"p{number}", params=(cold, warm)[number % 2]) for number in range(10)]
    with worker(ledger, redis_url) as claimed:
        assert [text(future.result(_LONG_S)) for future in futures] == [f"p{number}!" for number in range(10)]

    for lease in claimed:
        prompts = [int((request.prompt or "")[1:]) for request in lease.requests]
        assert lease.job_params == (cold, warm)[prompts[0] % 2]
        assert len({number % 2 for number in prompts}) == 1


def test_failure_is_a_result(client: Client, ledger: Ledger, redis_url: str) -> None:
    failure = Failure("prompt_too_long", "too long")
    with worker(ledger, redis_url, lambda lease: [Result(line=1, failure=failure)]):
        assert client.ask({"messages": [{"role": "user", "content": "Hi"}]}, timeout_s=_LONG_S).failure == failure


def test_what_cannot_be_asked_is_refused_at_once(client: Client, ledger: Ledger) -> None:
    refused = [
        ({"prompt": 5}, {}, "must be a string"),
        ({"prompt": "a", "model": "gpt-9"}, {}, "gpt-9"),
        ({"prompt": "a", "n": 3}, {}, "this asks for 3 Results, not one: use submit"),
        ("a", {"params": SamplingParams(n=2)}, "this asks for 2 Results"),
        ({"kind": "embed", "input": ["a", "b"]}, {}, "this asks for 2 Results"),
        ("a", {"params": SamplingParams(top_p=7.0)}, "top_p=7.0 is out of range"),
    ]
    for item, keywords, message in refused:
        with pytest.raises(InvalidRequest, match=message):
            client.ask_future(item, **keywords)  # type: ignore[arg-type]
    assert num_rows(ledger, jobs) == 0


def test_who_waits_too_long_is_told_and_the_prompt_is_computed_all_the_same(
    client: Client, ledger: Ledger, redis_url: str
) -> None:
    with pytest.raises(TimedOut, match=r"no answer came within 0\.2 s"):
        client.ask("slow", timeout_s=0.2)

    with worker(ledger, redis_url) as claimed:
        assert text(client.ask("next", timeout_s=_LONG_S)) == "next!"
    assert [request.prompt for lease in claimed for request in lease.requests] == ["slow", "next"]


def test_answers_come_without_redis(settings: Settings, ledger: Ledger, redis_url: str) -> None:
    with (
        Client(msgspec.structs.replace(settings, broker_url=NOBODY_LISTENS)) as client,
        worker(ledger, redis_url),
    ):
        assert text(client.ask("a", timeout_s=_LONG_S)) == "a!"


def test_prompt_whose_job_is_cancelled_or_deleted_is_not_waited_for(client: Client, ledger: Ledger) -> None:
    seen: str | None = None

    def newest_job() -> str:
        newest = select(chunks.c.job_id).order_by(chunks.c.id.desc()).limit(1)
        while (job_id := ledger.read(lambda connection: connection.scalar(newest))) in (None, seen):
            threading.Event().wait(0.01)
        return str(job_id)

    cancelled = client.ask_future("a")
    seen = newest_job()
    cancel_job(ledger, seen)
    deleted = client.ask_future("b")
    client.delete(newest_job(), force=True)

    for future in (cancelled, deleted):
        with pytest.raises(JobNotFound, match="was cancelled or deleted"):
            future.result(_LONG_S)


def test_closing_the_client_ends_all_waiting(settings: Settings, ledger: Ledger) -> None:
    with Client(settings) as client:
        futures = [client.ask_future(f"p{number}") for number in range(5)]
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(_LONG_S)
    with pytest.raises(RuntimeError, match="the client is closed"):
        client.ask("more")
