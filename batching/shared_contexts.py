"""SharedContexts: who among the running has the context that a scored Sequence continues, so that it is computed once.

Full blocks are shared by their names alone; this is for what a context has beyond them, which is all of a short one.
Many continuations of one context come one after the other, so the last one admitted stands for all before it.
"""

from collections.abc import Iterable

from batching.block_manager import content_name
from batching.sequence import Sequence


class SharedContexts:
    def __init__(self) -> None:
        self._holders: dict[bytes, Sequence] = {}

    def holder(self, seq: Sequence) -> Sequence | None:
        """A running Sequence of the same context, which has all of it when the step that is being made has run."""
        name = _name(seq)
        holder = None if name is None else self._holders.get(name)
        return holder if holder is not None and holder.num_computed >= seq.num_reusable else None

    def admit(self, seq: Sequence) -> None:
        """The first of a context stands for it while its step is being made: it computes what others copy."""
        name = _name(seq)
        if name is not None:
            seq.context_name = name
            self._holders.setdefault(name, seq)

    def renew(self, admitted: Iterable[Sequence]) -> None:
        """Their step is made: from now on they stand for their contexts, since they will be here longest."""
        for seq in admitted:
            if seq.context_name is not None:
                self._holders[seq.context_name] = seq

    def release(self, seq: Sequence) -> None:
        """Its blocks are its own no longer."""
        if seq.context_name is not None and self._holders.get(seq.context_name) is seq:
            del self._holders[seq.context_name]
        seq.context_name = None


def _name(seq: Sequence) -> bytes | None:
    """Of the tokens before the one whose logits are asked for first; None where nothing, or not only that, is left."""
    num_prompt = seq.num_prompt_tokens
    if seq.score_from is None or not 2 <= seq.score_from < num_prompt or seq.num_scored != seq.score_from:
        return None
    return content_name(b"", memoryview(seq.prompt_ids[: seq.score_from - 1].astype("<i4").tobytes()))
