"""The proof a Job is closed with holds as long as its Results are what was committed, and says where they are not."""

import msgspec
from sqlalchemy import Delete, Update, delete, select, update

from protocol.requests import Failure, Request, Result
from storage.completeness import Proof, verify
from storage.jobs import Job, append_chunk, close_job_if_done, reopen_errors, seal_job
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit
from storage.tables import chunks, jobs, results
from tests.storage.samples import answered, died, new_chunk, new_job, new_lease


def finished_job(ledger: Ledger) -> Job:
    """Lines 1 to 3 with two samples each, 4 and 5 refused at intake, 6 blank, 7 answered from the cache and dead."""
    job = new_job(ledger, n=2)
    first = new_chunk(ledger, job, [1, 2, 3])
    refused = [Result(line=line, failure=Failure("invalid_json", "it is not JSON")) for line in (4, 5)]
    last = append_chunk(
        ledger, job.id, first_line=4, last_line=7, requests=[Request(line=7, prompt="p")], failures=refused
    )
    assert last is not None
    seal_job(ledger, job.id, num_lines=7)
    lease = new_lease(ledger, first)
    commit(ledger, [ChunkCommit(lease, [two_samples(line, sample) for line in (1, 2) for sample in (0, 1)], False)])
    commit(ledger, [ChunkCommit(lease, [two_samples(3, sample) for sample in (1, 0)], True)])
    made = [of_two(answered(7, 0, is_cached=True)), of_two(died(7, 1))]
    commit(ledger, [ChunkCommit(new_lease(ledger, last), made, True)])
    assert close_job_if_done(ledger, job.id)
    return job


def two_samples(line: int, sample: int) -> Result:
    return of_two(answered(line, sample))


def of_two(result: Result) -> Result:
    assert result.params is not None
    return msgspec.structs.replace(result, params=msgspec.structs.replace(result.params, n=2))


def change(ledger: Ledger, statement: Update | Delete) -> None:
    assert ledger.write(lambda connection: connection.execute(statement)).rowcount == 1


def test_a_finished_job_is_closed_with_its_counts_and_the_digest_of_its_results(ledger: Ledger) -> None:
    job = finished_job(ledger)
    row = ledger.read(lambda connection: connection.execute(select(jobs).where(jobs.c.id == job.id)).one())
    verification = verify(ledger, job.id)
    assert verification.holds
    assert verification.stated == Proof(num_lines=7, num_results=10, num_errors=3, num_cached=1, digest=row.digest)


def test_equal_results_have_equal_digests_in_whatever_order_they_came(ledger: Ledger) -> None:
    one, other = new_job(ledger, "one"), new_job(ledger, "other")
    for job, order in ((one, [(1,), (2, 3)]), (other, [(3, 1), (2,)])):
        lease = new_lease(ledger, new_chunk(ledger, job, [1, 2, 3]))
        seal_job(ledger, job.id, num_lines=3)
        for lines in order:
            commit(ledger, [ChunkCommit(lease, [answered(line) for line in lines], lines is order[-1])])
        close_job_if_done(ledger, job.id)
    stated = [verify(ledger, job.id).stated for job in (one, other)]
    assert stated[0] == stated[1] is not None


def test_errors_that_are_tried_again_leave_the_proof_and_their_new_results_enter_it(ledger: Ledger) -> None:
    job = finished_job(ledger)
    assert reopen_errors(ledger, job.id, {"engine_died"}) == 1
    assert verify(ledger, job.id).stated is None
    chunk_id = ledger.read(
        lambda connection: connection.execute(select(chunks.c.id).where(chunks.c.first_line == 4)).scalar_one()
    )
    commit(ledger, [ChunkCommit(new_lease(ledger, chunk_id), [two_samples(7, 1)], True)])
    assert close_job_if_done(ledger, job.id)
    verification = verify(ledger, job.id)
    assert verification.holds
    assert verification.stated is not None
    assert verification.stated.num_errors == 2


def test_what_was_changed_or_lost_behind_the_ledgers_back_is_named(ledger: Ledger) -> None:
    job = finished_job(ledger)
    of_job = results.c.job_id == job.id
    change(ledger, update(results).where(of_job, results.c.line == 2, results.c.sample == 1).values(text="another"))
    verification = verify(ledger, job.id)
    assert (verification.holds, verification.altered, verification.num_incomplete) == (False, [(1, 3)], 0)

    change(ledger, delete(results).where(of_job, results.c.line == 3, results.c.sample == 0))
    change(ledger, delete(results).where(of_job, results.c.line == 7, results.c.sample == 0))
    change(ledger, delete(results).where(of_job, results.c.line == 7, results.c.sample == 1))
    verification = verify(ledger, job.id)
    assert (verification.num_incomplete, verification.incomplete) == (2, [3, 7])
    assert verification.altered == [(1, 3), (4, 7)]
    assert verification.stated is not None
    assert (verification.stated.num_results, verification.found.num_results) == (10, 7)
