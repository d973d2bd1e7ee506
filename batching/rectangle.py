"""Rectangle: Sequences side by side, whose next tokens are all in the same column.

Their prompts end in one column, so those shorter than the longest begin with padding; from there on every row gets a
token a step. Rows that have ended are padding too, until they are dropped. Columns to the left of a row's first token
are nothing to it, so rows may be moved to the right, beside longer ones.
"""

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

from batching.sequence import Sequence, SequenceState


@dataclass(slots=True, eq=False)
class Rectangle:
    number: int  # names its cache
    rows: list[Sequence]
    pads: list[int]  # columns before each row's first token
    width: int  # columns of what was known at the start
    column: int = 0  # the next one
    last_step: int = 0  # in which it ran

    @classmethod
    def of(cls, number: int, rows: Sequences[Sequence]) -> "Rectangle":
        width = max(seq.num_known for seq in rows)
        return cls(number, list(rows), [width - seq.num_known for seq in rows], width)

    @property
    def is_in_prefill(self) -> bool:
        return self.column < self.width

    @property
    def live(self) -> list[int]:
        return [row for row, seq in enumerate(self.rows) if seq.state is SequenceState.RUNNING]

    @property
    def least_priority(self) -> int:
        """Of its least urgent live row."""
        return max(self.rows[row].priority for row in self.live)

    @property
    def num_columns(self) -> int:
        """When the last of its live rows ends."""
        return max(
            (self.pads[row] + self.rows[row].num_prompt_tokens + self.rows[row].max_tokens for row in self.live),
            default=0,
        )

    @property
    def num_cells(self) -> int:
        """Tokens of the cache that it takes by then."""
        return len(self.rows) * self.num_columns

    def keep(self, rows: Sequences[int]) -> None:
        self.rows = [self.rows[row] for row in rows]
        self.pads = [self.pads[row] for row in rows]

    def skip_padding(self) -> None:
        """The next columns are left out as far as none of the live rows has a token in them."""
        num = min(self.pads[row] for row in self.live) - self.column
        if num > 0:
            self.pads = [pad - num for pad in self.pads]
            self.width -= num

    def join(self, other: "Rectangle") -> tuple[int, int]:
        """The rows of `other` come below these; columns of padding that either gets to its left."""
        column = max(self.column, other.column)
        shifts = column - self.column, column - other.column
        self.rows = self.rows + other.rows
        self.pads = [pad + shifts[0] for pad in self.pads] + [pad + shifts[1] for pad in other.pads]
        self.width = self.column = column
        return shifts

    def num_columns_with(self, other: "Rectangle") -> int:
        """Of both, once they are one."""
        column = max(self.column, other.column)
        return max(x.num_columns + column - x.column for x in (self, other))
