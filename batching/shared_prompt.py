"""SharedPrompt: a prompt that several samples have in common. One computes it; the others wait and then share it."""

from batching.sequence import Sequence, SequenceState


class SharedPrompt:
    def __init__(self, leader: Sequence) -> None:
        self.leader: Sequence | None = leader  # who is to compute the prompt; None when that has been launched
        self._parked: list[Sequence] = []  # those who wait for the leader, finished ones among them
        self._holders: dict[int, Sequence] = {}  # running, with the whole prompt in their blocks

    @property
    def holder(self) -> Sequence | None:
        """A Sequence from whose blocks the prompt can be had."""
        return next(iter(self._holders.values()), None)

    def park(self, seq: Sequence) -> None:
        self._parked.append(seq)

    def hold(self, seq: Sequence) -> list[Sequence]:
        """`seq` has the whole prompt in its blocks; returns those who no longer have to wait."""
        self._holders[seq.seq_id] = seq
        self.leader = None
        parked, self._parked = self._parked, []
        return [seq for seq in parked if seq.state is SequenceState.WAITING]

    def release(self, seq: Sequence) -> None:
        """Its blocks are its own no longer."""
        self._holders.pop(seq.seq_id, None)

    def leave(self, seq: Sequence) -> Sequence | None:
        """`seq` has ended. If it was to compute the prompt, the next who waits does: that one is returned."""
        if self.leader is not seq:
            return None
        self.leader = None
        while self._parked and self.leader is None:
            first = self._parked.pop(0)
            if first.state is SequenceState.WAITING:
                self.leader = first
        return self.leader
