"""Whose Chunk is claimed next."""

from collections import Counter

import pytest

from protocol.priority import PRIORITIES
from storage.jobs import find_job, set_priority
from storage.leases import claim_next
from storage.ledger import Ledger
from tests.storage.samples import MODEL, expire, new_chunk, new_job, new_lease


def claim_all(ledger: Ledger, most: int = 100) -> list[str]:
    """The Jobs of the Chunks claimed, in that order; nothing of them is finished meanwhile."""
    taken: list[str] = []
    while len(taken) < most and (lease := claim_next(ledger, [MODEL], "worker-1", 60)) is not None:
        taken.append(lease.job_id)
    return taken


def test_a_small_job_does_not_wait_behind_a_large_one(ledger: Ledger) -> None:
    large, small = new_job(ledger, "large"), new_job(ledger, "small")
    for line in range(1, 40):
        new_chunk(ledger, large, [line])
    claim_all(ledger, 5)
    new_chunk(ledger, small, [1])
    new_chunk(ledger, small, [2])

    assert claim_all(ledger, 3) == [small.id, small.id, large.id]


def test_tenants_share_alike_whatever_the_number_of_their_jobs(ledger: Ledger) -> None:
    jobs = [new_job(ledger, f"job {i}", tenant="many") for i in range(4)] + [new_job(ledger, "one", tenant="single")]
    for job in jobs:
        for line in range(1, 20):
            new_chunk(ledger, job, [line])

    counts = Counter(claim_all(ledger, 16))

    assert counts == {jobs[4].id: 8, **{job.id: 2 for job in jobs[:4]}}


def test_shares_are_of_requests_and_not_of_chunks(ledger: Ledger) -> None:
    wide, narrow = new_job(ledger, "wide"), new_job(ledger, "narrow")
    for start in range(1, 100, 4):
        new_chunk(ledger, wide, range(start, start + 4))
    for line in range(1, 100):
        new_chunk(ledger, narrow, [line])

    counts = Counter(claim_all(ledger, 25))

    assert counts == {wide.id: 5, narrow.id: 20}


def test_a_more_urgent_class_goes_first_and_only_the_classes_asked_for_are_given(ledger: Ledger) -> None:
    jobs = {priority: new_job(ledger, priority, priority=priority) for priority in reversed(PRIORITIES)}
    for job in jobs.values():
        new_chunk(ledger, job, [1])
        new_chunk(ledger, job, [2])

    lease = claim_next(ledger, [MODEL], "worker-1", 60, ranks=[2])
    assert lease is not None
    assert (lease.job_id, lease.priority) == (jobs["bulk"].id, 2)
    assert claim_all(ledger) == [jobs[name].id for name in ("interactive", "interactive", "normal", "normal", "bulk")]


def test_a_job_can_be_made_more_urgent_while_it_waits(ledger: Ledger) -> None:
    first, second = new_job(ledger, "first"), new_job(ledger, "second", priority="bulk")
    for job in (first, second):
        new_chunk(ledger, job, [1])
    set_priority(ledger, second.id, "interactive")

    assert find_job(ledger, second.id, "acme").priority == "interactive"
    assert claim_all(ledger) == [second.id, first.id]


def test_several_models_are_served_as_one_and_no_other(ledger: Ledger) -> None:
    own, other = new_job(ledger, "own"), new_job(ledger, "other", model="other", priority="interactive")
    lost, foreign = new_job(ledger, "lost", model="other"), new_job(ledger, "foreign", model="foreign")
    for job in (own, other, foreign):
        new_chunk(ledger, job, [1])
    expired = new_lease(ledger, new_chunk(ledger, lost, [1]), "who died")
    expire(ledger, expired.chunk_id)

    taken = []
    while (lease := claim_next(ledger, [MODEL, "other"], "worker-1", 60)) is not None:
        taken.append((lease.job_id, lease.model))

    assert taken == [(lost.id, "other"), (other.id, "other"), (own.id, MODEL)]


@pytest.mark.parametrize("state", ["cancelled", "other model"])
def test_what_may_not_be_worked_on_is_not_given(ledger: Ledger, state: str) -> None:
    from storage.jobs import cancel_job

    job = new_job(ledger, model=MODEL if state == "cancelled" else "another")
    new_chunk(ledger, job, [1])
    if state == "cancelled":
        cancel_job(ledger, job.id)

    assert claim_all(ledger) == []
