"""Jobs: intake, progress, closing and cancelling."""

import itertools
import threading
from functools import partial

import pytest
from sqlalchemy import update

from protocol.errors import JobNotFound, SubmissionConflict
from protocol.requests import Request
from protocol.sampling import SamplingParams
from storage.jobs import (
    Job,
    append_chunk,
    cancel_job,
    close_job_if_done,
    find_job,
    intake_position,
    job_status,
    list_jobs,
    open_job,
    seal_job,
    unclaimed_chunks,
)
from storage.leases import Lease, claim_next
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit, read_results
from storage.tables import chunks, jobs, results
from tests.storage.samples import (
    MODEL,
    add_many_chunks,
    answered,
    chunk_row,
    failed,
    new_chunk,
    new_job,
    new_lease,
    num_rows,
    run_threads,
)


def _finish(ledger: Ledger, chunk_id: int, lines: tuple[int, ...] = (1, 2, 3)) -> None:
    lease = new_lease(ledger, chunk_id)
    assert commit(ledger, [ChunkCommit(lease, [answered(line) for line in lines], is_finished=True)]) == set()


def test_open_job_makes_a_job_that_is_being_submitted(ledger: Ledger) -> None:
    params = SamplingParams(n=2, stop=("\n",), temperature=0.5)
    job, is_new = open_job(ledger, tenant="acme", identity="sha256:1", model="tiny", params=params)

    assert is_new
    assert len(job.id) == 16
    assert set(job.id) <= set("0123456789abcdef")
    assert job == Job(job.id, "acme", "sha256:1", "tiny", params, "submitting", job.created_at, None, None)


def test_open_job_finds_the_job_of_the_same_tenant_and_identity(ledger: Ledger) -> None:
    job, _ = open_job(ledger, tenant="acme", identity="same", model="tiny", params=SamplingParams())
    again, is_new = open_job(ledger, tenant="acme", identity="same", model="tiny", params=SamplingParams())
    other, other_is_new = open_job(ledger, tenant="other", identity="same", model="tiny", params=SamplingParams())

    assert (again, is_new) == (job, False)
    assert other_is_new
    assert other.id != job.id


def test_open_job_makes_one_job_when_threads_open_it_at_the_same_time(ledger: Ledger) -> None:
    opened = []
    barrier = threading.Barrier(6)

    def open_it() -> None:
        barrier.wait(30)
        opened.append(open_job(ledger, tenant="acme", identity="same", model="tiny", params=SamplingParams()))

    run_threads([open_it] * 6)

    assert len({job.id for job, _ in opened}) == 1
    assert sum(is_new for _, is_new in opened) == 1


def test_find_job_takes_an_id_a_prefix_of_it_or_an_identity(ledger: Ledger) -> None:
    job = new_job(ledger, "the identity")
    new_job(ledger, "another")

    assert find_job(ledger, job.id, "acme") == job
    assert find_job(ledger, job.id[:8], "acme") == job
    assert find_job(ledger, "the identity", "acme") == job


@pytest.mark.parametrize("name", ["", "%", "____", "abc", "0123456789abcdef", "The identity", "ABCDEF", "\x00"])
def test_find_job_raises_for_anything_else(ledger: Ledger, name: str) -> None:
    new_job(ledger, "the identity")
    with pytest.raises(JobNotFound):
        find_job(ledger, name, "acme")


def test_find_job_knows_no_jobs_of_other_tenants(ledger: Ledger) -> None:
    job = new_job(ledger, "the identity")
    for name in (job.id, job.id[:8], "the identity"):
        with pytest.raises(JobNotFound):
            find_job(ledger, name, "other")


def test_find_job_names_the_jobs_an_ambiguous_prefix_could_mean(ledger: Ledger) -> None:
    ids = [new_job(ledger, str(number)).id for number in range(2)]
    # Random ids do not meet by themselves.
    twin = ids[0][:4] + ids[1][4:]
    ledger.write(lambda connection: connection.execute(update(jobs).where(jobs.c.id == ids[1]).values(id=twin)))
    with pytest.raises(JobNotFound, match="give more of the id") as caught:
        find_job(ledger, ids[0][:4], "acme")
    assert ids[0] in str(caught.value)
    assert twin in str(caught.value)


def test_list_jobs_shows_the_tenants_newest_first(ledger: Ledger) -> None:
    made = [new_job(ledger, str(number)) for number in range(3)]
    open_job(ledger, tenant="other", identity="x", model="tiny", params=SamplingParams())

    listed = list_jobs(ledger, "acme", 10)

    assert {job.id for job in listed} == {job.id for job in made}
    assert [job.created_at for job in listed] == sorted((job.created_at for job in made), reverse=True)
    assert list_jobs(ledger, "acme", 2) == listed[:2]


def test_intake_goes_on_after_the_last_line_covered(ledger: Ledger) -> None:
    job = new_job(ledger)
    assert intake_position(ledger, job.id) == 0

    new_chunk(ledger, job, range(1, 65))
    assert intake_position(ledger, job.id) == 64

    append_chunk(ledger, job.id, first_line=65, last_line=70, requests=[], failures=[failed(66), failed(70)])
    assert intake_position(ledger, job.id) == 70


def test_a_chunk_of_failures_alone_is_finished_at_once(ledger: Ledger) -> None:
    job = new_job(ledger)
    chunk_id = append_chunk(ledger, job.id, first_line=1, last_line=2, requests=[], failures=[failed(1), failed(2)])

    assert chunk_id is None
    assert claim_next(ledger, [MODEL], "worker-1", 60, min_age_s=0) is None
    assert read_results(ledger, job.id) == [failed(1), failed(2)]
    status = job_status(ledger, job.id)
    assert (status.num_error, status.num_chunks, status.num_chunks_finished) == (2, 1, 1)


def test_append_chunk_stores_readable_and_malformed_lines_in_one_step(ledger: Ledger) -> None:
    job = new_job(ledger)
    requests = [Request(line=1, prompt="a\x00b"), Request(line=3, prompt="\N{SNOWMAN}")]
    chunk_id = append_chunk(ledger, job.id, first_line=1, last_line=3, requests=requests, failures=[failed(2)])

    assert chunk_id is not None
    lease = new_lease(ledger, chunk_id)
    assert lease.requests == requests
    assert read_results(ledger, job.id) == [failed(2)]


@pytest.mark.parametrize(("first_line", "last_line"), [(1, 3), (1, 5), (2, 5), (3, 9)])
def test_append_chunk_refuses_lines_that_are_in_already(ledger: Ledger, first_line: int, last_line: int) -> None:
    job = new_job(ledger)
    new_chunk(ledger, job, [1, 2, 3])
    with pytest.raises(SubmissionConflict, match="somebody else"):
        append_chunk(
            ledger, job.id, first_line=first_line, last_line=last_line, requests=[], failures=[failed(last_line)]
        )
    assert (num_rows(ledger, chunks), num_rows(ledger, results)) == (1, 0)


def test_two_producers_of_the_same_job_meet_a_clear_error(ledger: Ledger) -> None:
    job = new_job(ledger)
    barrier = threading.Barrier(2)
    conflicts = []

    def submit() -> None:
        try:
            for first_line in range(1, 200, 10):
                if first_line == 1:
                    barrier.wait(30)
                new_chunk(ledger, job, range(first_line, first_line + 10))
        except SubmissionConflict as error:
            conflicts.append(error)

    run_threads([submit, submit])

    covered = job_status(ledger, job.id)
    assert len(conflicts) == 1
    assert covered.num_requests == covered.num_lines == 200


def test_append_chunk_refuses_a_job_that_takes_no_more_lines(ledger: Ledger) -> None:
    job = new_job(ledger)
    new_chunk(ledger, job)
    seal_job(ledger, job.id, 3)
    with pytest.raises(SubmissionConflict, match="is running and takes no more"):
        new_chunk(ledger, job, [4])
    with pytest.raises(JobNotFound):
        append_chunk(ledger, "0" * 16, first_line=1, last_line=1, requests=[], failures=[])


def test_a_sealed_job_runs_until_its_last_chunk_is_finished(ledger: Ledger) -> None:
    job = new_job(ledger)
    chunk_ids = [new_chunk(ledger, job, lines) for lines in ([1, 2, 3], [4, 5])]
    seal_job(ledger, job.id, 5)
    assert find_job(ledger, job.id, "acme").state == "running"

    _finish(ledger, chunk_ids[0])
    assert not close_job_if_done(ledger, job.id)

    _finish(ledger, chunk_ids[1], (4, 5))
    assert close_job_if_done(ledger, job.id)
    assert not close_job_if_done(ledger, job.id)
    ended = find_job(ledger, job.id, "acme")
    assert (ended.state, ended.num_lines) == ("finished", 5)
    assert ended.ended_at is not None
    assert ended.ended_at >= ended.created_at


def test_a_job_is_not_closed_before_it_is_sealed(ledger: Ledger) -> None:
    job = new_job(ledger)
    _finish(ledger, new_chunk(ledger, job))
    assert not close_job_if_done(ledger, job.id)

    seal_job(ledger, job.id, 3)
    assert find_job(ledger, job.id, "acme").state == "finished"


def test_an_empty_job_is_finished_when_it_is_sealed(ledger: Ledger) -> None:
    job = new_job(ledger)
    seal_job(ledger, job.id, 0)
    assert job_status(ledger, job.id).is_finished


def test_sealing_again_changes_nothing(ledger: Ledger) -> None:
    job = new_job(ledger)
    new_chunk(ledger, job)
    seal_job(ledger, job.id, 3)
    before = find_job(ledger, job.id, "acme")
    seal_job(ledger, job.id, 99)
    assert find_job(ledger, job.id, "acme") == before


def _finish_and_close(ledger: Ledger, lease: Lease, line: int, barrier: threading.Barrier) -> None:
    barrier.wait(30)
    commit(ledger, [ChunkCommit(lease, [answered(line)], is_finished=True)])
    close_job_if_done(ledger, lease.job_id)


def _seal(ledger: Ledger, job_id: str, num_lines: int, barrier: threading.Barrier) -> None:
    barrier.wait(30)
    seal_job(ledger, job_id, num_lines)


def test_the_job_ends_however_its_last_two_chunks_and_the_seal_meet(ledger: Ledger) -> None:
    for number in range(10):
        job, barrier = new_job(ledger, str(number)), threading.Barrier(3)
        last_two = [new_lease(ledger, new_chunk(ledger, job, [line])) for line in (1, 2)]
        finishing = [partial(_finish_and_close, ledger, lease, n, barrier) for n, lease in enumerate(last_two, 1)]
        run_threads([*finishing, partial(_seal, ledger, job.id, 2, barrier)])
        assert find_job(ledger, job.id, "acme").state == "finished"


def test_unclaimed_chunks_are_listed_oldest_first_over_all_pages(ledger: Ledger) -> None:
    job, other = new_job(ledger), new_job(ledger, "other")
    claimed, first = new_chunk(ledger, job, [1]), new_chunk(ledger, job, [2])
    new_chunk(ledger, other, [1])
    new_lease(ledger, claimed)
    add_many_chunks(ledger, job, 2100)

    listed = list(unclaimed_chunks(ledger, job.id))

    assert listed[0] == first
    assert len(listed) == 2101
    assert all(a < b for a, b in itertools.pairwise(listed))


def test_status_adds_up_what_the_chunks_counted(ledger: Ledger) -> None:
    job = new_job(ledger)
    done, running = new_chunk(ledger, job, [1, 2]), new_chunk(ledger, job, [3, 4])
    append_chunk(ledger, job.id, first_line=5, last_line=7, requests=[Request(line=5)], failures=[failed(6), failed(7)])
    known = answered(2, is_cached=True)
    commit(ledger, [ChunkCommit(new_lease(ledger, done), [answered(1), known], is_finished=True)])
    commit(ledger, [ChunkCommit(new_lease(ledger, running), [failed(3)], is_finished=False)])

    status = job_status(ledger, job.id)

    assert (status.num_lines, status.num_ok, status.num_error, status.num_cached) == (7, 2, 3, 1)
    assert (status.num_chunks, status.num_chunks_finished) == (3, 1)
    assert (status.num_requests, status.num_requests_waiting, status.num_requests_leased) == (5, 1, 2)
    assert (status.prompt_tokens, status.completion_tokens, status.computed_tokens) == (6, 10, 5)
    assert not status.is_finished


def test_status_of_a_job_without_chunks_is_all_zero(ledger: Ledger) -> None:
    status = job_status(ledger, new_job(ledger).id)
    assert (status.num_lines, status.num_chunks, status.num_ok, status.prompt_tokens) == (0, 0, 0, 0)
    with pytest.raises(JobNotFound):
        job_status(ledger, "0" * 16)


def test_a_cancelled_job_gives_nothing_to_claim_and_loses_its_leases(ledger: Ledger) -> None:
    job = new_job(ledger)
    stored, _ = new_chunk(ledger, job), new_chunk(ledger, job, [4])
    lease = new_lease(ledger, stored)
    commit(ledger, [ChunkCommit(lease, [answered(1)], is_finished=False)])

    assert cancel_job(ledger, job.id)

    assert claim_next(ledger, [MODEL], "worker-2", 60, min_age_s=0) is None
    assert commit(ledger, [ChunkCommit(lease, [answered(2)], is_finished=False)]) == {stored}
    assert [result.line for result in read_results(ledger, job.id)] == [1]
    assert chunk_row(ledger, stored).num_ok == 1
    ended = find_job(ledger, job.id, "acme")
    assert ended.state == "cancelled"
    assert ended.ended_at is not None
    assert list(unclaimed_chunks(ledger, job.id)) == []


def test_a_job_that_has_ended_stays_as_it_is_when_it_is_cancelled_or_sealed(ledger: Ledger) -> None:
    job = new_job(ledger)
    assert cancel_job(ledger, job.id)
    seal_job(ledger, job.id, 3)
    assert not cancel_job(ledger, job.id)
    assert find_job(ledger, job.id, "acme").state == "cancelled"
    with pytest.raises(SubmissionConflict, match="is cancelled"):
        new_chunk(ledger, job)
    with pytest.raises(JobNotFound):
        cancel_job(ledger, "0" * 16)


def _submit_until_refused(ledger: Ledger, job: Job, barrier: threading.Barrier) -> None:
    barrier.wait(30)
    for line in itertools.count(1):
        try:
            new_chunk(ledger, job, [line])
        except SubmissionConflict:
            return


def _cancel(ledger: Ledger, job: Job, barrier: threading.Barrier) -> None:
    barrier.wait(30)
    cancel_job(ledger, job.id)


def test_a_job_cancelled_during_intake_gets_no_chunk_afterwards(ledger: Ledger) -> None:
    for number in range(10):
        job, barrier = new_job(ledger, str(number)), threading.Barrier(2)
        run_threads([partial(_submit_until_refused, ledger, job, barrier), partial(_cancel, ledger, job, barrier)])
        status = job_status(ledger, job.id)
        assert status.num_chunks_finished == status.num_chunks
        assert claim_next(ledger, [MODEL], "worker-1", 60, min_age_s=0) is None
