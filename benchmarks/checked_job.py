"""Jobs whose every answer is known beforehand, and the check that none of theirs is lost, duplicated or wrong.

The answers are those of engines that have one Sequence at a time and that nobody disturbs, computed once for a workload
and kept under out/. Prompts with two right answers (a near-tie of the best tokens, see benchmarks.sequential_answers)
are left out: which of the two comes is up to what else is in a step, not to what is killed.
"""

import sys
from collections import Counter

from benchmarks.sequential_answers import sequential_answers
from benchmarks.system import MODEL
from producer.client import Client
from protocol.sampling import SamplingParams
from storage.jobs import Job

MAX_TOKENS = 8
#: Prompts beyond those asked for, to make up for those with two right answers.
_NUM_SPARE = 20


class CheckedJob:
    """`num_requests` prompts, every tenth the same as an earlier one, and what the model says to them."""

    def __init__(self, num_requests: int) -> None:
        """Raises ValueError when too many prompts have a near-tie."""
        prompts = _make_prompts(num_requests + _NUM_SPARE)
        answers = sequential_answers(MODEL, prompts, MAX_TOKENS)
        sound = [(p, answer.text) for p, answer in zip(prompts, answers, strict=True) if not answer.is_near_tie]
        self.num_ties = len(prompts) - len(sound)
        say(f"{self.num_ties} prompts have a near-tie and are left out")
        if len(sound) < num_requests:
            raise ValueError(f"{self.num_ties} of {len(prompts)} prompts have a near-tie: {_NUM_SPARE} may have one")
        self._prompts = [prompt for prompt, _ in sound[:num_requests]]
        self._expected = [text for _, text in sound[:num_requests]]

    def submit(self, client: Client) -> Job:
        lines = [{"prompt": prompt} for prompt in self._prompts]
        return client.submit(lines, name="checked", params=SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0))

    def check(self, client: Client, job: Job) -> Counter[str]:
        """Counts of Results that are "lost", "duplicated" and "wrong"."""
        found = {}
        num_rows = 0
        for result in client.results(job, wait=False):
            num_rows += 1
            found[result.line] = result
        expected_at = dict(enumerate(self._expected, start=1))
        lost, unknown = expected_at.keys() - found.keys(), found.keys() - expected_at.keys()
        problems = Counter(lost=len(lost), duplicated=num_rows - len(found), wrong=len(unknown))
        for line, expected in expected_at.items():
            row = found.get(line)
            if row is not None and (row.answer is None or row.answer.text != expected):
                problems["wrong"] += 1
                say(f"line {line} is wrong: {row.failure or row.answer}, expected {expected!r}")
        verification = client.verify(job)
        if not verification.holds:
            problems["wrong"] += 1
            say(f"the Job does not verify: {verification}")
        return problems


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _make_prompts(num: int) -> list[str]:
    """Beginnings of functions, every tenth the same as an earlier one."""
    verbs = ("read", "write", "count", "merge", "split", "find", "load", "sort", "check", "make")
    nouns = ("lines", "items", "keys", "words", "files", "rows", "nodes")
    names = (f"{verbs[i % 10]}_{nouns[i % 7]}_{i}" for i in range(num))
    prompts = [f"def {name}({'a, ' * (i % 5)}b):\n" for i, name in enumerate(names)]
    return [prompts[i // 2] if i % 10 == 9 else prompt for i, prompt in enumerate(prompts)]
