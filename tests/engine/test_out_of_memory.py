"""Steps that the memory is too small for: they get smaller, nobody's tokens change, and room comes back."""

import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from batching.padded import PaddedPlan
from batching.scheduler import StepPlan
from batching.token_budget import TokenBudget
from tests.engine.reference import Reference, Run, collect, drive, new_sequence, settings_for
from worker.engine.engine import Engine
from worker.engine.runner import StepHandle


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("where", ["launch", "wait"])
def test_a_step_that_is_too_large_is_halved_and_everybody_gets_the_same_tokens(
    lookahead: int,
    where: str,
    model_folder: Callable[[str], Path],
    reference: Callable[[str], Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = reference("llama")
    settings = settings_for(model_folder("llama"), lookahead=lookahead, max_batch_tokens=256, max_num_seqs=4)
    engine = Engine.start(settings)
    launch, sizes, num_failures = engine.runner.launch, [], 0

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("as if it were")

    def launch_or_fail(plan: StepPlan) -> StepHandle:
        nonlocal num_failures
        if plan.num_scheduled_tokens > 40:
            num_failures += 1
            if where == "launch":
                fail()
            launch(plan)
            return cast("StepHandle", SimpleNamespace(wait=fail, done=None, is_captured=False, num_padding=0))
        sizes.append(plan.num_scheduled_tokens)
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", launch_or_fail)
    prompts = [(prompt * 3)[:90] for prompt in expected.prompts]
    sequences = [new_sequence(i, prompt, 12, score_from=1) for i, prompt in enumerate(prompts)]
    undisturbed = drive(Engine.start(settings), sequences)

    run = drive(engine, sequences)

    assert num_failures > 1
    assert run.outputs == undisturbed.outputs
    assert run.reasons == undisturbed.reasons
    assert scored_lengths(run.scores) == scored_lengths(undisturbed.scores)
    assert max(sizes) <= 40


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_step_that_fails_behind_its_forward_pass_leaves_nothing_of_it_in_memory(
    layout: str, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.start(settings_for(model_folder("llama"), layout=layout))
    sample = engine.runner._sample
    kept: list[weakref.ref[torch.Tensor]] = []

    def fail_once(*arguments: Any, **keywords: Any) -> Any:
        if not kept:
            kept.append(weakref.ref(engine.runner._scorer._output[0]))
            raise torch.OutOfMemoryError("as if it were")
        return sample(*arguments, **keywords)

    monkeypatch.setattr(engine.runner, "_sample", fail_once)
    engine.add(new_sequence(0, [1, 2, 3, 4], 2, score_from=1))
    engine.step()

    assert kept[0]() is None
    run = Run({0: []})
    while engine.has_work:
        collect(engine, run)
    assert len(run.outputs[0]) == 2
    assert scored_lengths(run.scores) == {0: 4 * 3}  # bytes


def test_fewer_sequences_run_when_one_token_of_each_is_too_much(
    model_folder: Callable[[str], Path], reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference("llama")
    sequences = [new_sequence(i, prompt, 8) for i, prompt in enumerate(expected.prompts[:10])]
    engine = Engine.start(settings_for(model_folder("llama"), max_num_seqs=8, admission="auto"))
    launch, sizes = engine.runner.launch, []

    def launch_or_fail(plan: StepPlan) -> StepHandle:
        if plan.num_scheduled_tokens > 3:
            raise torch.OutOfMemoryError("as if it were")
        sizes.append(len(plan.sequences))
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", launch_or_fail)

    run = drive(engine, sequences)

    assert [run.outputs[i] for i in range(10)] == [output[:8] for output in expected.outputs[:10]]
    assert 1 < max(sizes) <= 3


def test_a_rectangle_that_is_too_large_starts_again_with_fewer_rows_and_everybody_gets_the_same_tokens(
    model_folder: Callable[[str], Path], reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(model_folder("bloom"), layout="padded", max_num_seqs=6)
    sequences = [
        new_sequence(i, prompt, 12, temperature=i % 2, seed=i) for i, prompt in enumerate(reference("bloom").prompts)
    ]
    undisturbed = drive(Engine.start(settings), sequences)
    engine, num_failures, most_cells = Engine.start(settings), 0, 0
    launch = engine.runner.launch

    def launch_or_fail(plan: StepPlan) -> StepHandle:
        nonlocal num_failures, most_cells
        assert isinstance(plan, PaddedPlan)
        num_cells = len(plan.rectangle) * (plan.first_column + plan.num_columns)
        # Also in the middle of the answers, when some tokens of them are known.
        if num_cells > 100 and len(plan.rectangle) > 1:
            num_failures += 1
            raise torch.OutOfMemoryError("as if it were")
        most_cells = max(most_cells, num_cells if len(plan.rectangle) > 1 else 0)
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", launch_or_fail)
    run = drive(engine, sequences)

    assert num_failures > 3
    assert run.outputs == undisturbed.outputs
    assert run.reasons == undisturbed.reasons
    assert 50 < most_cells <= 100
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


def scored_lengths(scores: dict[int, list[Any]]) -> dict[int, int]:
    return {seq_id: sum(len(part.logprobs) for part in parts) for seq_id, parts in scores.items()}


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_an_engine_whose_smallest_step_does_not_fit_gives_up(
    layout: str, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.start(settings_for(model_folder("llama"), layout=layout))

    def fail(_plan: StepPlan) -> StepHandle:
        raise torch.OutOfMemoryError("as if it were")

    monkeypatch.setattr(engine.runner, "launch", fail)
    engine.add(new_sequence(0, [1, 2, 3], 4))
    with pytest.raises(torch.OutOfMemoryError):
        all(engine.step() for _ in range(100))


def test_a_budget_comes_back_slowly_and_never_gets_too_small() -> None:
    budget = TokenBudget(1024, 100)
    assert [budget.halve() for _ in range(5)] == [True, True, True, True, False]
    assert budget.tokens == 100
    for _ in range(64):
        budget.step_done()
    assert budget.tokens == 164
    for _ in range(64 * 20):
        budget.step_done()
    assert budget.tokens == 1024
