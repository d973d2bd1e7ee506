"""Summary: what became of a Job, gathered while its Results go by."""

from collections import Counter
from collections.abc import Mapping

import click

from cli.counted import counted
from producer.client import RETRIABLE_CODES
from protocol.requests import Result
from storage.jobs import JobStatus

_NUM_SHOWN = 3
#: Of a prompt or an answer, so much is shown.
_MAX_LINES = 5
_MAX_WIDTH = 100


class Summary:
    """Takes in Results one by one, and shows them as one."""

    def __init__(self) -> None:
        self._errors: Counter[str] = Counter()
        self._first: list[Result] = []

    def add(self, result: Result) -> None:
        """Take in the next Result."""
        if result.failure is not None:
            self._errors[result.failure.code] += 1
        elif len(self._first) < _NUM_SHOWN and result.answer is not None and result.answer.text:
            self._first.append(result)

    def text(self, status: JobStatus, place: str) -> str:
        """Numbers, then where the Results are."""
        known = f" ({status.num_cached:,} known already)" if status.num_cached else ""
        lines = [f"{counted(status.num_ok + status.num_error, 'result')}: {counted(status.num_ok, 'answer')}{known}"]
        if self._errors:
            codes = ", ".join(f"{code} {number:,}" for code, number in self._errors.most_common())
            lines[0] += f", {counted(status.num_error, 'error')} ({codes})"
        lines.append(f"{status.completion_tokens:,} output tokens")
        if status.computed_tokens != status.completion_tokens:
            lines[-1] += f", {status.completion_tokens - status.computed_tokens:,} of them from known answers"
        if status.job.state == "cancelled":
            lines.append("the Job was cancelled, so the rest is missing")
        num_retriable = sum(number for code, number in self._errors.items() if code in RETRIABLE_CODES)
        if num_retriable and status.job.state != "cancelled":
            lines.append(
                f"{counted(num_retriable, 'error')} may go away: the same command with --retry-errors tries again"
            )
        lines.append(f"written to {place}")
        return "\n".join(lines)

    def first_answers(self, prompts: Mapping[int, str]) -> str:
        """Prompt and answer of the first lines, shortened; empty when none has a text."""
        shown: list[str] = []
        for result in self._first:
            assert result.answer is not None
            shown += _excerpt(f"{result.line}: ", prompts.get(result.line, ""))
            shown += _excerpt("-> ", result.answer.text)
        return "\n".join(shown)


def check_any_answer(status: JobStatus, where: str) -> None:
    """Raises ClickException, hence exit code 1, for a Job that has errors and nothing else."""
    if status.num_error and not status.num_ok:
        raise click.ClickException(f"no line was answered, there is nothing but errors ({status.num_error:,}); {where}")


def _excerpt(mark: str, text: str) -> list[str]:
    """The first lines of the text behind the mark, and below it with their indentation."""
    # Control characters would otherwise reach the terminal.
    lines = [
        "".join(c if c.isprintable() else " " for c in line.expandtabs(4)) for line in text.strip("\n").split("\n")
    ]
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES - 1 :] = ["..."]
    lines = [line if len(line) <= _MAX_WIDTH else line[: _MAX_WIDTH - 3] + "..." for line in lines]
    margin = " " * 6
    return [(mark.rjust(len(margin)) + lines[0]).rstrip()] + [(margin + line).rstrip() for line in lines[1:]]
