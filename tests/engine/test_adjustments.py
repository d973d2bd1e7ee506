"""Penalties, biases, min_tokens and min_p in the engine, against a plain reference and transformers' logits."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protocol.frames import LogitTerms, NewSequence
from tests.engine.families import VOCAB_SIZE
from tests.engine.plain_sampling import Floats, adjusted, assert_follows, distribution
from tests.engine.reference import Run, drive, new_sequence, random_prompts, settings_for
from worker.engine.adjustments import penalize
from worker.engine.engine import Engine
from worker.engine.sampler import sample

NUM_TOKENS = 30
#: Below this gap between the best two logits float32 rounding may decide.
MIN_GAP = 1e-4
#: Repetition alone keeps tokens apart, a strong bias brings the same one again and again, so that counts grow.
TERMS = [
    LogitTerms(repetition_penalty=1.3),
    LogitTerms(repetition_penalty=0.7, frequency_penalty=0.5),
    LogitTerms(presence_penalty=1.5),
    LogitTerms(frequency_penalty=0.75, logit_bias={3: 8.0, 40: 7.5, 77: -100.0}),
    LogitTerms(logit_bias={5: 100.0, 6: 99.5}, presence_penalty=2.0, frequency_penalty=-0.5),
    LogitTerms(logit_bias={11: 6.0}),
    LogitTerms(min_tokens=12, logit_bias={9: 20.0}),
    LogitTerms(repetition_penalty=1.7, presence_penalty=-1.0, frequency_penalty=0.3, logit_bias={8: 3.0}, min_tokens=9),
]
STOP = (9, 8, 400)


def with_terms(new: NewSequence, **fields: Any) -> NewSequence:
    return NewSequence(**{**{name: getattr(new, name) for name in new.__struct_fields__}, **fields})


@pytest.fixture(scope="module")
def logits_of(model_folder: Callable[[str], Path]) -> Callable[[Sequence[int]], Floats]:
    """The last position's logits of a text, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32).eval()

    def logits(text: Sequence[int]) -> Floats:
        with torch.inference_mode():
            return np.asarray(model(torch.tensor([list(text)])).logits[0, -1].double().numpy())

    return logits


@pytest.fixture(scope="module")
def expected(logits_of: Callable[[Sequence[int]], Floats]) -> list[tuple[NewSequence, list[int], int]]:
    """Sequences with their greedy outputs, and how many tokens of each are beyond doubt."""
    cases = []
    for i, prompt in enumerate(random_prompts(16, seed=7, max_len=30)):
        terms, stop = TERMS[i % len(TERMS)], STOP if i % 2 else ()
        outputs: list[int] = []
        num_certain = NUM_TOKENS
        while len(outputs) < NUM_TOKENS and not (outputs and outputs[-1] in stop):
            logits = adjusted(logits_of([*prompt, *outputs]), terms, prompt, outputs, stop)
            second, first = np.sort(logits)[-2:]
            if first - second < MIN_GAP:
                num_certain = min(num_certain, len(outputs))
            outputs.append(int(logits.argmax()))
        cases.append((with_terms(new_sequence(i, prompt, NUM_TOKENS, stop=stop), terms=terms), outputs, num_certain))
    return cases


def assert_as_expected(run: Run, expected: list[tuple[NewSequence, list[int], int]]) -> None:
    for new, outputs, num_certain in expected:
        assert run.outputs[new.seq_id][:num_certain] == outputs[:num_certain], TERMS[new.seq_id % len(TERMS)]
    assert sum(num for _, _, num in expected) >= 0.95 * sum(len(outputs) for _, outputs, _ in expected)


def test_reference_texts_are_worth_comparing(expected: list[tuple[NewSequence, list[int], int]]) -> None:
    by_terms = {i: outputs for i, (_, outputs, _) in enumerate(expected)}
    assert max(by_terms[3].count(token) for token in by_terms[3]) >= 3  # counts beyond one matter
    assert len(by_terms[7]) > 9  # min_tokens holds a stop token off, and then it comes
    assert len({tuple(outputs) for outputs in by_terms.values()}) > len(TERMS)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_greedy_text_with_every_term_equals_the_plain_reference(
    lookahead: int, model_folder: Callable[[str], Path], expected: list[tuple[NewSequence, list[int], int]]
) -> None:
    engine = Engine.start(settings_for(model_folder("llama"), lookahead=lookahead))

    assert_as_expected(drive(engine, [new for new, _, _ in expected]), expected)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_counts_are_rebuilt_exactly_after_preemption_and_survive_chunks(
    lookahead: int, model_folder: Callable[[str], Path], expected: list[tuple[NewSequence, list[int], int]]
) -> None:
    engine = Engine.start(
        settings_for(model_folder("llama"), lookahead=lookahead, kv_tokens=128, max_batch_tokens=17, max_num_seqs=9)
    )

    run = drive(engine, [new for new, _, _ in expected], wave=8)

    assert engine.scheduler.num_preemptions > 0
    assert_as_expected(run, expected)


def test_padded_rectangles_apply_every_term_too(
    model_folder: Callable[[str], Path], expected: list[tuple[NewSequence, list[int], int]]
) -> None:
    engine = Engine.start(settings_for(model_folder("llama"), layout="padded"))

    assert_as_expected(drive(engine, [new for new, _, _ in expected]), expected)


def test_rows_without_terms_are_untouched_beside_rows_with_them(
    model_folder: Callable[[str], Path], expected: list[tuple[NewSequence, list[int], int]]
) -> None:
    engine = Engine.start(settings_for(model_folder("llama")))
    plain = [with_terms(new, terms=None, seq_id=new.seq_id + 100) for new, _, _ in expected]
    alone = drive(engine, plain)
    assert len(engine.runner._adjustments._counts) == 0  # nothing is allocated before a row needs it

    mixed = drive(engine, [x for pair in zip(plain, (e[0] for e in expected), strict=True) for x in pair], wave=10)

    assert {i: mixed.outputs[i] for i in alone.outputs} == alone.outputs
    assert_as_expected(mixed, expected)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_seeded_draws_with_terms_do_not_depend_on_batch_chunks_or_preemption(
    lookahead: int, model_folder: Callable[[str], Path]
) -> None:
    sequences = [
        with_terms(
            new_sequence(i, prompt, 40, stop=STOP if i % 4 == 2 else (), temperature=0.9, seed=i, top_k=[0, 40][i % 2]),
            terms=TERMS[i % len(TERMS)],
            min_p=[0.0, 0.02, 0.1][i % 3],
            logprobs=[None, 2][i % 2],
        )
        for i, prompt in enumerate(random_prompts(16, seed=8, max_len=40))
    ]
    alone: dict[int, list[int]] = {}
    engine = Engine.start(settings_for(model_folder("qwen3")))
    for sequence in sequences:
        alone |= drive(engine, [sequence]).outputs
    crowded = Engine.start(settings_for(model_folder("qwen3"), lookahead=lookahead, kv_tokens=160, max_batch_tokens=17))

    together = drive(crowded, sequences, wave=8)

    assert crowded.scheduler.num_preemptions > 0
    assert together.outputs == alone


def test_table_of_counts_grows_to_as_many_lines_as_rows_need(model_folder: Callable[[str], Path]) -> None:
    engine = Engine.start(settings_for(model_folder("llama"), max_num_seqs=37))
    prompts = random_prompts(60, seed=9, max_len=5)
    terms = LogitTerms(presence_penalty=0.5)

    drive(engine, [with_terms(new_sequence(i, p, 6), terms=terms) for i, p in enumerate(prompts)], wave=60)

    assert len(engine.runner._adjustments._counts) == 37


@pytest.mark.parametrize(
    ("terms", "limits"),
    [
        (None, {"min_p": 0.08}),
        (None, {"min_p": 1.0}),
        (None, {"min_p": 0.02, "temperature": 1.6, "top_p": 0.7, "top_k": 9}),
        (LogitTerms(repetition_penalty=1.5), {}),
        (LogitTerms(logit_bias={4: 5.0, 5: -100.0, 100: 100.0, 101: 100.5}), {"temperature": 1.3}),
        (LogitTerms(repetition_penalty=0.8, logit_bias={4: 2.0}), {"temperature": 0.7, "top_p": 0.9}),
        (LogitTerms(min_tokens=1), {}),
    ],
)
def test_first_tokens_follow_the_exact_distribution(
    terms: LogitTerms | None,
    limits: dict[str, Any],
    model_folder: Callable[[str], Path],
    logits_of: Callable[[Sequence[int]], Floats],
) -> None:
    prompt = [4, 17, 4, 300]
    logits = logits_of(prompt)
    stop = [int(token) for token in np.argsort(-logits)[:2]]  # likely ones, so that holding them off shows
    engine = Engine.start(settings_for(model_folder("llama"), max_num_seqs=256))
    fields = {"temperature": 1.0, **limits}
    sequences = [
        with_terms(new_sequence(i, prompt, 1, stop=tuple(stop), seed=i), terms=terms, **fields) for i in range(3000)
    ]

    run = drive(engine, sequences, wave=256, steps_between=1)

    expected = distribution(adjusted(logits, terms or LogitTerms(), prompt, [], stop), **fields)
    assert_follows([tokens[0] for tokens in run.outputs.values()], expected)


def test_draws_under_penalties_of_outputs_follow_the_exact_distribution() -> None:
    from tests.engine.test_sampler import draws_for

    num, prompt, outputs = 60_000, [1, 2, 2, 3], [3, 4, 4, 4, 30]
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    counts = torch.zeros(40, dtype=torch.int32)
    counts[[1, 2, 3]] = 1 << 30
    counts += torch.bincount(torch.tensor(outputs), minlength=40).int()
    for repetition, presence, frequency in [(1.4, 0.0, 0.0), (1.0, 1.5, 0.0), (1.0, 0.0, -0.8), (0.8, -1.0, 0.9)]:
        terms = (torch.full((1, 1), value) for value in (repetition, presence, frequency))
        penalized = penalize(logits[None], counts[None], *terms)

        tokens = sample(penalized.expand(num, -1), draws_for(num, temperature=1.2))

        wanted = adjusted(logits.numpy(), LogitTerms(repetition, presence, frequency), prompt, outputs)
        np.testing.assert_allclose(penalized[0].numpy(), wanted, rtol=1e-5, atol=1e-5)
        assert_follows(tokens.tolist(), distribution(wanted, temperature=1.2))


def test_min_p_keeps_exactly_its_support() -> None:
    from tests.engine.test_sampler import draws_for

    probabilities = [0.4, 0.2, 0.199, 0.1, 0.05, 0.051]
    logits = torch.tensor(probabilities).log().expand(5000, -1)

    def support(min_p: float) -> list[int]:
        draws = draws_for(5000, min_p=min_p)
        return sorted(set(sample(logits, draws).tolist()))

    assert support(0.0) == [0, 1, 2, 3, 4, 5]
    assert support(0.1251) == [0, 1, 2, 3, 5]
    assert support(0.26) == [0, 1, 2]
    assert support(0.499) == [0, 1]
    assert support(1.0) == [0]


def test_bias_beyond_the_vocabulary_is_refused(model_folder: Callable[[str], Path]) -> None:
    engine = Engine.start(settings_for(model_folder("llama")))
    engine.add(with_terms(new_sequence(1, [3], 5), terms=LogitTerms(logit_bias={VOCAB_SIZE: 1.0})))

    frame = engine.step()

    assert frame is not None
    assert "logit_bias" in dict(frame.refused)[1]
