"""Summary: what became of a Job, gathered while its Results go by."""

from collections import Counter
from collections.abc import Mapping

from protocol.requests import Result
from storage.jobs import JobStatus

_NUM_SHOWN = 3
#: Characters of a prompt and of an answer that are shown.
_MAX_SHOWN = 160


class Summary:
    """`prompts` are the texts of the first lines, to be shown beside their answers."""

    def __init__(self, prompts: Mapping[int, str] | None = None) -> None:
        self._prompts = prompts or {}
        self._errors: Counter[str] = Counter()
        self._first: list[Result] = []

    def add(self, result: Result) -> None:
        """Take in the next Result."""
        if result.failure is not None:
            self._errors[result.failure.code] += 1
        elif len(self._first) < _NUM_SHOWN:
            self._first.append(result)

    def text(self, status: JobStatus, output: str) -> str:
        """Numbers, then where the Results are."""
        known = f" ({status.num_cached:,} known already)" if status.num_cached else ""
        lines = [f"{status.num_ok + status.num_error:,} results: {status.num_ok:,} answers{known}"]
        if self._errors:
            codes = ", ".join(f"{code} {number:,}" for code, number in self._errors.most_common())
            lines[0] += f", {status.num_error:,} error{'s' * (status.num_error != 1)} ({codes})"
        lines.append(f"{status.completion_tokens:,} output tokens, {status.computed_tokens:,} of them computed")
        if status.job.state == "cancelled":
            lines.append("the Job was cancelled, so the rest is missing")
        lines.append(f"written to {'stdout' if output == '-' else output}")
        return "\n".join(lines)

    def first_answers(self) -> str:
        """Prompt and answer of the first lines, shortened; empty when there is no answer at all."""
        shown = []
        for result in self._first:
            assert result.answer is not None
            prompt = self._prompts.get(result.line)
            shown.append(f"line {result.line}" + (f": {_shortened(prompt)}" if prompt else ""))
            shown.append(f"  -> {_shortened(result.answer.text)}")
        return "\n".join(shown)


def _shortened(text: str) -> str:
    # Control characters would otherwise reach the terminal, line breaks the layout.
    plain = "".join(c if c.isprintable() else " " for c in text[: 4 * _MAX_SHOWN].replace("\n", " ⏎ "))
    plain = " ".join(plain.split())
    return plain if len(plain) <= _MAX_SHOWN else plain[: _MAX_SHOWN - 3] + "..."
