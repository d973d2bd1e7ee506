"""JobResults: a Job's stored Results, each exactly once, in the order of the lines or in the order in which they land.

Knows what has been read so far; when to look again is for its caller to say.
"""

from collections.abc import Collection, Iterator
from typing import Literal

from protocol.requests import Result
from storage.landings import LandedChunk, landed_chunks
from storage.ledger import Ledger
from storage.results import read_results

Order = Literal["input", "finished"]

#: Rows read from the ledger at a time.
_PAGE = 1000
_BEFORE_FIRST_SAMPLE, _BEHIND_LAST_SAMPLE = -1, 1 << 30


class InputOrder:
    """Results line by line."""

    def __init__(self, ledger: Ledger, job_id: str) -> None:
        self._ledger = ledger
        self._job_id = job_id
        self._after = (0, _BEFORE_FIRST_SAMPLE)

    def read(self, up_to_line: int | None) -> Iterator[Result]:
        """What is stored behind the last one read, up to this line."""
        for result in stored_results(self._ledger, self._job_id, self._after, up_to_line):
            self._after = (result.line, result.sample)
            yield result


class FinishedOrder:
    """Results as they land, a Chunk's in the order of its lines.

    What it remembers is bounded by the Chunks that have landed before an earlier one was through, not by the Job.
    """

    def __init__(self, ledger: Ledger, job_id: str) -> None:
        self._ledger = ledger
        self._job_id = job_id
        #: All Chunks up to this line are settled and have been read to the end.
        self._line = 0
        self._ends: dict[int, int] = {}  # last line by first, of Chunks behind `_line` that are read to the end
        self._read: dict[int, set[tuple[int, int]]] = {}  # (line, sample) by Chunk, of those that are not

    def read(self, ids: Collection[int] | None) -> Iterator[Result]:
        """What has landed and was not read yet: in these Chunks, or wherever it is."""
        after_line = self._line
        while True:
            page = landed_chunks(self._ledger, self._job_id, after_line=after_line, ids=ids, limit=_PAGE)
            for chunk in page:
                yield from self._read_chunk(chunk)
            if len(page) < _PAGE:
                return
            after_line = page[-1].first_line

    def _read_chunk(self, chunk: LandedChunk) -> Iterator[Result]:
        if chunk.first_line <= self._line or chunk.first_line in self._ends:
            return
        read = self._read.setdefault(chunk.id, set())
        # An error that is being computed again was told already: its other outcome is not another Result.
        if len(read) < chunk.num_results:
            before = (chunk.first_line - 1, _BEHIND_LAST_SAMPLE)
            for result in stored_results(self._ledger, self._job_id, before, chunk.last_line):
                if (result.line, result.sample) not in read:
                    read.add((result.line, result.sample))
                    yield result
        if chunk.is_settled:
            del self._read[chunk.id]
            self._ends[chunk.first_line] = chunk.last_line
            while (last_line := self._ends.pop(self._line + 1, None)) is not None:
                self._line = last_line


def stored_results(
    ledger: Ledger, job_id: str, after: tuple[int, int], up_to_line: int | None = None
) -> Iterator[Result]:
    """The Results behind (line, sample), a page at a time. Raises DatabaseUnavailable."""
    while True:
        page = read_results(ledger, job_id, after=after, up_to_line=up_to_line, limit=_PAGE)
        yield from page
        if len(page) < _PAGE:
            return
        after = (page[-1].line, page[-1].sample)
