"""FairShare: tenants, and the Jobs of each, get tokens alike while all of them have work waiting, in each class apart.

Start-time fair queueing. A Sequence gets a tag when it comes: where its Job's last one ends in the class's virtual
time, or now if that is past. It ends by its tokens further on, times the number of its tenant's Jobs, so that a tenant
gets no more for having many. Whoever has the smallest tag goes first; virtual time is the tag of the last one that was
admitted. So nobody saves up for later, and a Job that comes now is no further behind than one Sequence of each other.
"""

from collections import Counter

from batching.sequence import Sequence


class FairShare:
    """What it costs does not depend on how many wait."""

    def __init__(self) -> None:
        self._now: dict[int, float] = {}  # virtual time, by priority
        self._ends: dict[tuple[int, str, str], float] = {}  # of each Job's last Sequence, while any of it is alive
        self._num_alive: Counter[tuple[int, str, str]] = Counter()  # Sequences of each Job
        self._num_jobs: Counter[tuple[int, str]] = Counter()  # of each tenant

    def join(self, seq: Sequence) -> None:
        """It has come: sets its `fair_start`."""
        job, tenant = _job(seq), (seq.priority, seq.tenant)
        if not self._num_alive[job]:
            self._num_jobs[tenant] += 1
        self._num_alive[job] += 1
        seq.fair_start = max(self._now.get(seq.priority, 0.0), self._ends.get(job, 0.0))
        num_tokens = seq.num_prompt_tokens + seq.max_tokens
        self._ends[job] = seq.fair_start + num_tokens * self._num_jobs[tenant]

    def move(self, seq: Sequence, priority: int) -> None:
        """It belongs to another class from now on, as if it had come to that one just now."""
        self.leave(seq)
        seq.priority = priority
        self.join(seq)

    def admit(self, seq: Sequence) -> None:
        """It starts."""
        self._now[seq.priority] = max(self._now.get(seq.priority, 0.0), seq.fair_start)

    def leave(self, seq: Sequence) -> None:
        """It has ended, whether it was ever admitted or not."""
        job, tenant = _job(seq), (seq.priority, seq.tenant)
        self._num_alive[job] -= 1
        if not self._num_alive[job]:
            del self._num_alive[job], self._ends[job]
            self._num_jobs[tenant] -= 1
            if not self._num_jobs[tenant]:
                del self._num_jobs[tenant]


def _job(seq: Sequence) -> tuple[int, str, str]:
    return seq.priority, seq.tenant, seq.job
