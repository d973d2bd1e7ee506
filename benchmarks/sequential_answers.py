"""What a model says to prompts one at a time: the greedy answers of an engine that has one Sequence, and nothing else
to do. One engine per core shares the prompts out; no step of theirs ever holds two.

An answer comes with its narrowest choice: where the two best tokens are as good as equal, either is a right answer, and
which one is given depends on what else is in the step, since float32 sums are rounded in another order there.

Kept under out/, by the model's fingerprint and all that is asked: the next run with the same workload reads them.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protocol.frames import NewSequence
from protocol.requests import Request
from protocol.settings import EngineSettings

#: Tokens of log-probabilities (in nats) closer than this are equally right in float32, whose sums over a whole model
#: differ by about 1e-5 from one order to another.
NEAR_TIE = 1e-4
_FOLDER = Path(__file__).resolve().parents[1] / "out"
#: Prompts handed to an engine at a time.
_BATCH = 50


class Answer(NamedTuple):
    text: str
    margin: float  # in nats, the least by which a token was ahead of the second best

    @property
    def is_near_tie(self) -> bool:
        return self.margin < NEAR_TIE


def sequential_answers(model: Path, prompts: list[str], max_tokens: int) -> list[Answer]:
    """For each prompt what the model in this folder says."""
    from worker.engine.model_files import files_digest, fingerprint

    workload = json.dumps([fingerprint(files_digest(model), "float32"), max_tokens, prompts, "with margins"])
    kept = _FOLDER / f"sequential-{hashlib.sha256(workload.encode()).hexdigest()[:16]}.json"
    distinct = list(dict.fromkeys(prompts))
    if kept.exists():
        answers = [Answer(*pair) for pair in json.loads(kept.read_text())]
        print(f"{len(distinct)} answers of an undisturbed engine from {kept}", file=sys.stderr, flush=True)
    else:
        answers = list(_compute(model, distinct, max_tokens))
        _FOLDER.mkdir(exist_ok=True)
        partial = kept.with_suffix(".new")
        partial.write_text(json.dumps(answers))
        partial.replace(kept)
    known = dict(zip(distinct, answers, strict=True))
    return [known[prompt] for prompt in prompts]


def _compute(model: Path, prompts: list[str], max_tokens: int) -> Iterator[Answer]:
    batches = [prompts[i : i + _BATCH] for i in range(0, len(prompts), _BATCH)]
    num_done = 0
    with ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), initializer=_start, initargs=(str(model), max_tokens)
    ) as pool:
        for answers in pool.map(_answer, batches):
            yield from answers
            num_done += len(answers)
            if num_done % (10 * _BATCH) == 0 or num_done == len(prompts):
                print(f"{num_done} of {len(prompts)} answers, one at a time", file=sys.stderr, flush=True)


_one: Any = None  # of this process


def _start(model: str, max_tokens: int) -> None:
    global _one
    _one = _OneAtATime(model, max_tokens)


def _answer(prompts: list[str]) -> list[Answer]:
    return [_one.answer(prompt) for prompt in prompts]


class _OneAtATime:
    def __init__(self, model: str, max_tokens: int) -> None:
        from worker.defaults import read_model_defaults
        from worker.engine.engine import Engine
        from worker.text import Tokenizer

        self._max_tokens = max_tokens
        self._tokenizer = Tokenizer(Path(model))
        self._stop_token_ids = read_model_defaults(Path(model), self._tokenizer.eos_token_id).stop_token_ids
        settings = EngineSettings(model=model, max_num_seqs=1, device="cpu", kv_tokens=4096, num_threads=1)
        self._engine = Engine.start(settings)

    def answer(self, prompt: str) -> Answer:
        (ids,) = self._tokenizer.encode([Request(line=1, prompt=prompt)])
        assert isinstance(ids, list)
        wishes: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "sample": 0}
        packed = np.asarray(ids, dtype="<i4").tobytes()
        self._engine.add(
            NewSequence(
                1, packed, max_tokens=self._max_tokens, stop_token_ids=self._stop_token_ids, logprobs=2, **wishes
            )
        )
        tokens: list[int] = []
        margins: list[float] = []
        while self._engine.has_work:
            frame = self._engine.step()
            assert frame is not None
            tokens += np.frombuffer(frame.token_ids, "<i4").tolist()
            for _, piece in frame.logprobs:
                best, second = np.frombuffer(piece, "<f4")[-2:].tolist()
                margins.append(best - second)
        shown = tokens[:-1] if tokens[-1] in self._stop_token_ids else tokens
        return Answer(self._tokenizer.decode(ids, shown), min(margins))
