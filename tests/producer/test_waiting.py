"""Waiting for Results: the order they come in, and who wakes those who wait."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import msgspec
import pytest
import redis

from producer.client import Client
from protocol.errors import ConfigurationError, JobNotFound, TimedOut
from protocol.requests import Result
from protocol.settings import Settings
from storage.jobs import close_job_if_done
from storage.landing_channel import LandingChannel, channel
from storage.leases import Lease, claim_next
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit
from tests.producer.conftest import MODEL, NOBODY_LISTENS, answer_oldest, answered, lines_of

#: Seconds after which a test that waits for a word has failed.
_LONG_S = 60.0


@pytest.fixture
def never_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks into the ledger unless Redis tells them to."""
    for name in ("_FIRST_S", "_LAST_S", "_LAST_HEARD_S"):
        monkeypatch.setattr(f"producer.pauses.{name}", 1000.0)
    monkeypatch.setattr("producer.job_watch._PROGRESS_S", 1000.0)


def take_oldest(ledger: Ledger, owner: str = "slow") -> Lease:
    lease = claim_next(ledger, [MODEL], owner, 60, min_age_s=0)
    assert lease is not None
    return lease


@pytest.fixture
def store(ledger: Ledger, channel_of_workers: LandingChannel) -> Callable[..., None]:
    """Commit Results for these lines of a Chunk, and say so, as a worker does."""

    def store(lease: Lease, *lines: int, is_finished: bool) -> None:
        results = [answered(request) for request in lease.requests if request.line in lines]
        commit(ledger, [ChunkCommit(lease, results, is_finished=is_finished)])
        channel_of_workers.publish({lease.job_id: [lease.chunk_id]})

    return store


def wait_for_listener(redis_url: str, job_id: str) -> None:
    with redis.Redis.from_url(redis_url) as server:
        while server.pubsub_numsub(channel(job_id))[0][1] == 0:
            threading.Event().wait(0.005)


def test_finished_order_tells_results_as_they_land_and_each_once(
    client: Client, ledger: Ledger, store: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.job_results._PAGE", 2)
    job = client.submit([f"p{number}" for number in range(12)])
    first = take_oldest(ledger)
    assert answer_oldest(ledger) == [5, 6, 7, 8]
    results = client.results(job, order="finished")

    assert lines_of(islice(results, 4)) == [5, 6, 7, 8]
    store(first, 3, is_finished=False)
    assert next(results).line == 3
    store(first, 1, 4, is_finished=False)
    assert lines_of(islice(results, 2)) == [1, 4]
    store(first, 2, is_finished=True)
    store(take_oldest(ledger), *range(9, 13), is_finished=True)
    assert sorted(lines_of(results)) == [2, 9, 10, 11, 12]


def test_finished_order_without_waiting_is_what_is_stored(
    client: Client, ledger: Ledger, store: Callable[..., None]
) -> None:
    job = client.submit([f"p{number}" for number in range(12)])
    store(take_oldest(ledger), 2, is_finished=False)
    answer_oldest(ledger)

    assert lines_of(client.results(job, order="finished", wait=False)) == [2, 5, 6, 7, 8]


def test_unknown_order_and_unknown_job_are_refused_at_the_call(client: Client) -> None:
    job = client.submit(["a"])
    with pytest.raises(ConfigurationError, match="order='random' is unknown: it is one of input, finished"):
        client.results(job, order="random")  # type: ignore[arg-type]
    with pytest.raises(JobNotFound):
        client.results("nothing")


@pytest.mark.usefixtures("never_polls")
@pytest.mark.parametrize("order", ["input", "finished"])
def test_word_from_redis_wakes_who_reads_results(
    order: str, client: Client, ledger: Ledger, redis_url: str, store: Callable[..., None]
) -> None:
    job = client.submit([f"p{number}" for number in range(8)])
    read: list[int] = []

    def read_all() -> None:
        read.extend(lines_of(client.results(job, order=order, timeout_s=_LONG_S)))  # type: ignore[arg-type]

    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read_all)
        wait_for_listener(redis_url, job.id)
        for _ in range(2):
            store(take_oldest(ledger), *range(1, 9), is_finished=True)
        reader.result(_LONG_S)

    assert read == list(range(1, 9))


@pytest.mark.usefixtures("never_polls")
def test_word_from_redis_wakes_who_waits_for_the_end(client: Client, redis_url: str) -> None:
    job = client.submit(["a"])
    with ThreadPoolExecutor() as pool:
        waiter = pool.submit(client.wait, job, timeout_s=_LONG_S)
        wait_for_listener(redis_url, job.id)
        assert client.cancel(job)
        assert waiter.result(_LONG_S).job.state == "cancelled"
    assert not client.cancel(job)


@pytest.mark.usefixtures("never_polls")
def test_listening_goes_on_after_redis_dropped_the_connection(client: Client, redis_url: str) -> None:
    job = client.submit(["a"])
    with ThreadPoolExecutor() as pool, redis.Redis.from_url(redis_url) as server:
        waiter = pool.submit(client.wait, job, timeout_s=_LONG_S)
        wait_for_listener(redis_url, job.id)
        assert server.client_kill_filter(_type="pubsub") == 1
        wait_for_listener(redis_url, job.id)
        client.cancel(job)
        assert waiter.result(_LONG_S).job.state == "cancelled"


@pytest.mark.parametrize("order", ["input", "finished"])
def test_results_are_found_without_redis(order: str, settings: Settings, ledger: Ledger) -> None:
    with Client(msgspec.structs.replace(settings, broker_url=NOBODY_LISTENS)) as client:
        job = client.submit([f"p{number}" for number in range(8)])
        results = client.results(job, order=order)  # type: ignore[arg-type]
        answer_oldest(ledger)
        assert lines_of(islice(results, 4)) == [1, 2, 3, 4]
        answer_oldest(ledger, closes_job=False)
        assert lines_of(results) == [5, 6, 7, 8]


@pytest.mark.parametrize(
    "wait", [lambda c, j: c.wait(j, timeout_s=0.1), lambda c, j: list(c.results(j, timeout_s=0.1))]
)
def test_waiting_ends_after_the_time_given_and_the_job_goes_on(
    wait: Callable[[Client, object], object], client: Client, ledger: Ledger
) -> None:
    job = client.submit(["a"])

    with pytest.raises(TimedOut, match=f"{job.id} .*it goes on"):
        wait(client, job)
    assert issubclass(TimedOut, TimeoutError)
    answer_oldest(ledger)
    assert client.wait(job, timeout_s=_LONG_S).is_finished


def test_threads_share_a_client(client: Client, ledger: Ledger, store: Callable[..., None]) -> None:
    num_threads = 8
    start = threading.Barrier(num_threads)

    def submit_and_read(number: int) -> list[Result]:
        start.wait(_LONG_S)
        job = client.submit([f"t{number} p{i}" for i in range(6)], name=f"job {number}")
        return list(client.results(job, timeout_s=_LONG_S))

    with ThreadPoolExecutor(num_threads) as pool:
        readers = [pool.submit(submit_and_read, number) for number in range(num_threads)]
        for _ in range(2 * num_threads):
            while (lease := claim_next(ledger, [MODEL], "worker", 60, min_age_s=0)) is None:
                threading.Event().wait(0.01)
            store(lease, *range(1, 7), is_finished=True)
            close_job_if_done(ledger, lease.job_id)
        for number, reader in enumerate(readers):
            texts = [result.answer and result.answer.text for result in reader.result(_LONG_S)]
            assert texts == [f"t{number} p{i}!" for i in range(6)]
