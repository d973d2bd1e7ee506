"""How far a source is read ahead of the workers."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from producer.client import Client
from producer.wakeups import WaitStopped, Wakeup
from protocol.errors import ConfigurationError, SubmissionConflict
from storage.jobs import job_status
from storage.landing_channel import LandingChannel
from storage.landings import num_unfinished_requests
from storage.ledger import Ledger
from tests.producer.conftest import answer_oldest

_LONG_S = 60.0


class Endless:
    """Prompts without end, and how many were taken."""

    num_taken = 0

    def __iter__(self) -> Iterator[str]:
        while True:
            self.num_taken += 1
            yield f"p{self.num_taken}"


def wait_until_unfinished(ledger: Ledger, client: Client, number: int) -> None:
    while not client.jobs() or num_unfinished_requests(ledger, client.jobs()[0].id) < number:
        threading.Event().wait(0.01)


def test_window_lets_an_endless_source_run_only_so_far_ahead(
    client: Client, ledger: Ledger, channel_of_workers: LandingChannel
) -> None:
    source = Endless()
    with ThreadPoolExecutor() as pool:
        submitting = pool.submit(client.submit, source, name="endless", window=10)
        for num_done in range(0, 24, 4):
            wait_until_unfinished(ledger, client, 8)
            # The window, a Chunk of 4 that does not fit any more, and the item that shows that it is full.
            assert source.num_taken <= num_done + 10 + 4 + 1
            assert len(answer_oldest(ledger)) == 4
            channel_of_workers.publish({client.jobs()[0].id: ()})
        wait_until_unfinished(ledger, client, 8)
        client.cancel("endless")
        with pytest.raises(SubmissionConflict, match="is cancelled and takes no more lines"):
            submitting.result(_LONG_S)


def test_window_smaller_than_a_chunk_makes_smaller_chunks(
    client: Client, ledger: Ledger, channel_of_workers: LandingChannel
) -> None:
    with ThreadPoolExecutor() as pool:
        submitting = pool.submit(client.submit, [f"p{i}" for i in range(5)], window=2)
        for lines in ([1, 2], [3, 4], [5]):
            wait_until_unfinished(ledger, client, len(lines))
            assert answer_oldest(ledger) == lines
            channel_of_workers.publish({client.jobs()[0].id: ()})
        job = submitting.result(_LONG_S)
    assert job_status(ledger, job.id).is_finished


def test_submit_is_stopped_while_it_waits_for_room_and_gone_on_with(client: Client, ledger: Ledger) -> None:
    wakeup = Wakeup()
    prompts = [f"p{i}" for i in range(20)]
    with ThreadPoolExecutor() as pool:
        submitting = pool.submit(client.submit, prompts, window=8, wakeup=wakeup)
        wait_until_unfinished(ledger, client, 8)
        wakeup.stop()
        with pytest.raises(WaitStopped):
            submitting.result(_LONG_S)
    assert client.status(client.jobs()[0]).num_lines == 8

    assert client.submit(prompts).num_lines == 20
    assert [answer_oldest(ledger)[0] for _ in range(5)] == [1, 5, 9, 13, 17]


def test_window_that_nothing_fits_into_is_refused(client: Client) -> None:
    with pytest.raises(ConfigurationError, match="window=0 is out of range"):
        client.submit(["a"], window=0)
    assert client.jobs() == []
