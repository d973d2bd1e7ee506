"""Results: fenced, counted once, stored exactly, read in order."""

import threading
from collections import Counter
from functools import partial
from itertools import chain

import msgspec
import pytest
from sqlalchemy import select

from protocol.requests import Answer, Failure, Request, Result
from protocol.sampling import SamplingParams, resolve
from storage.answers import find_answers
from storage.jobs import append_chunk, job_status, unclaimed_chunks
from storage.leases import Lease, claim_next
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit, read_results
from storage.tables import answers, results
from tests.storage.lossy_proxy import LossyProxy
from tests.storage.samples import (
    MODEL,
    answered,
    chunk_row,
    expire,
    failed,
    new_chunk,
    new_job,
    new_lease,
    num_rows,
    run_threads,
)

_ANSWER = Answer(text="an answer", finish_reason="stop", prompt_tokens=3, completion_tokens=5)


def _counters(ledger: Ledger, chunk_id: int) -> tuple[int, ...]:
    row = chunk_row(ledger, chunk_id)
    return (row.num_ok, row.num_error, row.num_cached, row.prompt_tokens, row.completion_tokens, row.computed_tokens)


def test_results_are_read_back_exactly_as_they_were_committed(ledger: Ledger) -> None:
    job = new_job(ledger)
    lease = new_lease(ledger, new_chunk(ledger, job))
    params = resolve(SamplingParams(temperature=0.7, top_p=0.9, top_k=5, seed=-1, stop=("a", "\n"), n=3), max_tokens=7)
    params = msgspec.structs.replace(params, logit_bias={5: -1.5}, logprobs=2)
    with_logprobs = msgspec.structs.replace(_ANSWER, logprobs=b"\x00packed\xff")
    written = [
        Result(
            line=1,
            sample=2,
            custom_id="id \x00 \ud800",
            carried='{"user":"u"}',
            endpoint="/v1/chat/completions",
            answer=_ANSWER,
        ),
        Result(line=2, answer=Answer(text="", finish_reason="length", prompt_tokens=1, completion_tokens=0)),
        Result(line=3, failure=Failure("too_long", "4097 tokens\x00 are more than 4096"), params=params, seconds=1.5),
        Result(line=3, sample=1, answer=with_logprobs, is_cached=True, params=params),
    ]

    assert commit(ledger, [ChunkCommit(lease, written, False, answers={b"k" * 32: with_logprobs})]) == set()

    assert read_results(ledger, job.id) == written
    assert find_answers(ledger, [b"k" * 32]) == {b"k" * 32: with_logprobs}


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "a\x00b\x1a0000",
        "\x1a",
        "\x1a\x1a1a1a",
        "\ud800",
        "\udfff\x00\ud800",
        "\N{GRINNING FACE}",
        "line\r\n\\x00",
    ],
)
def test_any_text_a_model_can_print_is_stored_and_read_back(ledger: Ledger, text: str) -> None:
    job = new_job(ledger)
    lease = new_lease(ledger, new_chunk(ledger, job))
    key, answer = b"k" * 32, Answer(text=text, finish_reason="stop", prompt_tokens=1, completion_tokens=1)

    commit(ledger, [ChunkCommit(lease, [answered(1, text=text)], is_finished=False, answers={key: answer})])

    (result,) = read_results(ledger, job.id)
    assert result.answer is not None
    assert result.answer.text == text
    assert find_answers(ledger, [key]) == {key: answer}


def test_ordinary_text_is_stored_as_it_is(ledger: Ledger) -> None:
    job = new_job(ledger)
    lease = new_lease(ledger, new_chunk(ledger, job))
    commit(ledger, [ChunkCommit(lease, [answered(1, text='Tab\there, "quotes" \\ ü')], is_finished=False)])
    stored = ledger.read(lambda connection: connection.exec_driver_sql("SELECT text FROM results").scalar_one())
    assert stored == 'Tab\there, "quotes" \\ ü'


def test_results_are_read_in_order_page_by_page(ledger: Ledger) -> None:
    job, other = new_job(ledger), new_job(ledger, "other")
    lease = new_lease(ledger, new_chunk(ledger, job, range(1, 12)))
    written = [answered(line, sample) for line in range(11, 0, -1) for sample in (1, 0)]
    commit(ledger, [ChunkCommit(lease, written, is_finished=True)])
    commit(ledger, [ChunkCommit(new_lease(ledger, new_chunk(ledger, other)), [answered(1)], is_finished=True)])

    pages = []
    after = (0, -1)
    while page := read_results(ledger, job.id, after=after, limit=5):
        pages.append([(result.line, result.sample) for result in page])
        after = pages[-1][-1]

    assert list(chain(*pages)) == [(line, sample) for line in range(1, 12) for sample in (0, 1)]
    assert [len(page) for page in pages] == [5, 5, 5, 5, 2]


def test_the_counters_say_what_the_rows_say(ledger: Ledger) -> None:
    job = new_job(ledger)
    chunk_id = append_chunk(
        ledger, job.id, first_line=1, last_line=4, requests=[Request(line=1, prompt="p")], failures=[failed(4)]
    )
    assert chunk_id is not None
    lease = new_lease(ledger, chunk_id)

    commit(ledger, [ChunkCommit(lease, [answered(1), answered(2, is_cached=True)], is_finished=False)])
    assert _counters(ledger, chunk_id) == (2, 1, 1, 6, 10, 5)
    assert chunk_row(ledger, chunk_id).state == "leased"

    commit(ledger, [ChunkCommit(lease, [failed(3)], is_finished=True)])
    assert _counters(ledger, chunk_id) == (2, 2, 1, 6, 10, 5)
    assert chunk_row(ledger, chunk_id).state == "finished"


def test_committing_the_same_again_changes_nothing(ledger: Ledger) -> None:
    job = new_job(ledger)
    chunk_id = new_chunk(ledger, job)
    lease = new_lease(ledger, chunk_id)
    part = ChunkCommit(lease, [answered(1), failed(2)], is_finished=False, answers={b"k" * 32: _ANSWER})
    rest = ChunkCommit(lease, [answered(3)], is_finished=True)

    for each in (part, rest):
        assert commit(ledger, [each]) == set()
        before = (chunk_row(ledger, chunk_id), read_results(ledger, job.id), num_rows(ledger, answers))
        assert commit(ledger, [each]) == set()
        assert (chunk_row(ledger, chunk_id), read_results(ledger, job.id), num_rows(ledger, answers)) == before


def test_a_result_that_comes_twice_in_one_commit_is_stored_and_counted_once(ledger: Ledger) -> None:
    chunk_id = new_chunk(ledger, new_job(ledger))
    lease = new_lease(ledger, chunk_id)
    both = [ChunkCommit(lease, [answered(1), answered(1)], is_finished=False)]
    both.append(ChunkCommit(lease, [answered(1), answered(2)], is_finished=True))

    assert commit(ledger, both) == set()

    assert _counters(ledger, chunk_id)[0] == num_rows(ledger, results) == 2


def test_what_an_earlier_attempt_stored_stays(ledger: Ledger) -> None:
    job = new_job(ledger)
    chunk_id = new_chunk(ledger, job)
    commit(ledger, [ChunkCommit(new_lease(ledger, chunk_id), [answered(1, text="first")], is_finished=False)])
    expire(ledger, chunk_id)

    second = new_lease(ledger, chunk_id, "worker-2")
    written = [answered(1, text="second"), answered(2, text="second")]
    commit(ledger, [ChunkCommit(second, written, is_finished=False)])

    stored = read_results(ledger, job.id)
    assert [result.answer.text for result in stored if result.answer] == ["first", "second"]
    assert _counters(ledger, chunk_id)[0] == 2
    attempts = ledger.read(lambda connection: connection.execute(select(results.c.line, results.c.attempt)).all())
    assert sorted(map(tuple, attempts)) == [(1, 1), (2, 2)]


def test_a_lost_lease_writes_no_results_while_the_rest_of_the_group_lands(ledger: Ledger) -> None:
    job = new_job(ledger)
    kept, lost = new_chunk(ledger, job, [1, 2]), new_chunk(ledger, job, [3, 4])
    kept_lease, lost_lease = new_lease(ledger, kept), new_lease(ledger, lost)
    expire(ledger, lost)
    taken = new_lease(ledger, lost, "worker-2")

    group = [
        ChunkCommit(lost_lease, [answered(3)], is_finished=True, answers={b"l" * 32: _ANSWER}),
        ChunkCommit(kept_lease, [answered(1)], is_finished=True, answers={b"k" * 32: _ANSWER}),
    ]

    assert commit(ledger, group) == {lost}
    assert [result.line for result in read_results(ledger, job.id)] == [1]
    assert (chunk_row(ledger, kept).state, chunk_row(ledger, lost).state) == ("finished", "leased")
    assert _counters(ledger, lost) == (0, 0, 0, 0, 0, 0)
    assert commit(ledger, [ChunkCommit(taken, [answered(3)], is_finished=True)]) == set()


def test_the_answers_of_a_lost_lease_are_kept(ledger: Ledger) -> None:
    """Another Chunk's Result was stored as known on the strength of an answer that was then nowhere to be found."""
    job = new_job(ledger)
    lost, joined = new_chunk(ledger, job, [1]), new_chunk(ledger, job, [2])
    lease, joined_lease = new_lease(ledger, lost), new_lease(ledger, joined)
    expire(ledger, lost)
    new_lease(ledger, lost, "worker-2")

    group = [
        ChunkCommit(lease, [answered(1)], is_finished=True, answers={b"k" * 32: _ANSWER}),
        ChunkCommit(joined_lease, [answered(2, is_cached=True)], is_finished=True),
    ]
    assert commit(ledger, group) == {lost}

    assert [result.line for result in read_results(ledger, job.id)] == [2]
    assert find_answers(ledger, [b"k" * 32]) == {b"k" * 32: _ANSWER}


def test_the_same_owner_is_fenced_from_its_own_earlier_attempt(ledger: Ledger) -> None:
    chunk_id = new_chunk(ledger, new_job(ledger))
    first = new_lease(ledger, chunk_id)
    expire(ledger, chunk_id)
    new_lease(ledger, chunk_id)
    assert commit(ledger, [ChunkCommit(first, [answered(1)], is_finished=False)]) == {chunk_id}


def test_a_lease_whose_time_has_passed_is_the_owners_until_somebody_takes_it(ledger: Ledger) -> None:
    job = new_job(ledger)
    chunk_id = new_chunk(ledger, job)
    lease = new_lease(ledger, chunk_id)
    expire(ledger, chunk_id)

    assert commit(ledger, [ChunkCommit(lease, [answered(1)], is_finished=True)]) == set()
    assert claim_next(ledger, [MODEL], "worker-2", 60) is None
    assert len(read_results(ledger, job.id)) == 1


def test_a_chunk_finished_by_somebody_else_is_lost(ledger: Ledger) -> None:
    chunk_id = new_chunk(ledger, new_job(ledger))
    first = new_lease(ledger, chunk_id)
    expire(ledger, chunk_id)
    second = new_lease(ledger, chunk_id, "worker-2")
    commit(ledger, [ChunkCommit(second, [answered(1)], is_finished=True)])
    assert commit(ledger, [ChunkCommit(first, [answered(1)], is_finished=True)]) == {chunk_id}


def test_hundreds_of_results_of_many_chunks_land_in_one_commit(ledger: Ledger) -> None:
    jobs = [new_job(ledger, str(number)) for number in range(2)]
    group = []
    for job in jobs:
        for first_line in range(1, 641, 64):
            lines = range(first_line, first_line + 64)
            lease = new_lease(ledger, new_chunk(ledger, job, lines))
            keys = {f"{job.identity:>16}{line:>16}".encode(): _ANSWER for line in lines}
            group.append(ChunkCommit(lease, [answered(line) for line in lines], is_finished=True, answers=keys))

    assert commit(ledger, group) == set()

    for job in jobs:
        status = job_status(ledger, job.id)
        assert (status.num_ok, status.num_chunks_finished) == (640, 10)
        assert [result.line for result in read_results(ledger, job.id)] == list(range(1, 641))
    known = find_answers(ledger, [key for each in group for key in each.answers])
    assert len(known) == 1280
    assert commit(ledger, []) == set()


def _commit_each(ledger: Ledger, leases: list[Lease], barrier: threading.Barrier) -> None:
    barrier.wait(30)
    for lease in leases:
        written = [answered(request.line) for request in lease.requests]
        shared = {bytes([number]) * 32: _ANSWER for number in range(20)}
        commit(ledger, [ChunkCommit(lease, written, is_finished=True, answers=shared)])


def test_workers_that_commit_the_same_answers_at_the_same_time_do_not_fail(ledger: Ledger) -> None:
    job = new_job(ledger)
    leases = [new_lease(ledger, new_chunk(ledger, job, [line])) for line in range(1, 41)]
    barrier = threading.Barrier(4)

    run_threads([partial(_commit_each, ledger, leases[number::4], barrier) for number in range(4)])

    assert Counter(result.line for result in read_results(ledger, job.id)) == Counter(range(1, 41))
    assert num_rows(ledger, answers) == 20


def test_a_commit_whose_reply_is_lost_counts_once(lossy_ledger: Ledger, lossy_proxy: LossyProxy) -> None:
    job = new_job(lossy_ledger)
    chunk_id = new_chunk(lossy_ledger, job)
    lease = new_lease(lossy_ledger, chunk_id)

    for number, is_finished in ((1, False), (2, True)):
        lossy_proxy.lose_next_commit()
        assert commit(lossy_ledger, [ChunkCommit(lease, [answered(number)], is_finished=is_finished)]) == set()
        assert lossy_proxy.num_lost == number

    assert [result.line for result in read_results(lossy_ledger, job.id)] == [1, 2]
    assert _counters(lossy_ledger, chunk_id) == (2, 0, 0, 6, 10, 10)
    assert chunk_row(lossy_ledger, chunk_id).state == "finished"


def test_intake_whose_reply_is_lost_is_in_once(lossy_ledger: Ledger, lossy_proxy: LossyProxy) -> None:
    lossy_proxy.lose_next_commit()
    job = new_job(lossy_ledger)
    lossy_proxy.lose_next_commit()
    chunk_id = new_chunk(lossy_ledger, job, [1, 2])
    lossy_proxy.lose_next_commit()
    assert append_chunk(lossy_ledger, job.id, first_line=3, last_line=3, requests=[], failures=[failed(3)]) is None

    assert lossy_proxy.num_lost == 3
    assert list(unclaimed_chunks(lossy_ledger, job.id)) == [chunk_id]
    status = job_status(lossy_ledger, job.id)
    assert (status.num_chunks, status.num_requests, status.num_error, status.num_lines) == (2, 2, 1, 3)
