"""Rehearsal: which kernels an engine is going to launch, noted before any of them is compiled."""

from contextlib import suppress

import numpy as np
import torch

from batching.block_manager import BlockManager
from batching.scheduler import Scheduler
from batching.sequence import Sequence
from worker.engine.attention import AttentionBackend
from worker.engine.kernels.building import Launch, noted
from worker.engine.kernels.obstacle import triton_obstacle
from worker.engine.limits import Limits
from worker.engine.loader import LoadedModel
from worker.engine.runner import Runner

#: Tokens of the prompt that is rehearsed, for which every kernel is launched as for many; and rows of the smaller of
#: two decode steps.
_TOKENS, _FEW_ROWS = 4096, 2


def rehearse(loaded: LoadedModel, backend: AttentionBackend, limits: Limits) -> list[Launch]:
    """Run decode of few and of many rows, and a prompt whose tokens are scored; kernels of ours are left out.

    What is not met here is compiled when it is first launched.
    """
    if triton_obstacle(loaded.device) is not None:
        return []
    runner = Runner(loaded, backend, max_num_seqs=limits.max_num_seqs, num_blocks=1)
    with noted() as launches, suppress(torch.OutOfMemoryError):  # whoever is to run it makes do with less, or says so
        if backend.is_capturable:  # else decode needs lengths that it is not given here
            runner.decode.rehearse(_FEW_ROWS)
            runner.decode.rehearse()
        num_tokens = min(_TOKENS, limits.max_batch_tokens, loaded.max_model_len - 1)
        is_scored = loaded.scoring_obstacle is None and num_tokens > 1
        blocks = BlockManager(num_tokens // backend.block_size + 1, backend.block_size)
        scheduler = Scheduler(blocks, max_num_seqs=1, max_batch_tokens=num_tokens, max_model_len=num_tokens + 1)
        prompt = np.zeros(num_tokens, dtype=np.int32)
        scheduler.add(Sequence(0, prompt, max_tokens=1, score_from=1 if is_scored else None, num_top=int(is_scored)))
        plan = scheduler.schedule()
        assert plan is not None
        # Kernels that are not noted run, and the runner's cache has fewer blocks; what they read does not matter.
        plan.new_blocks = [(row, i, 0) for row, i, _ in plan.new_blocks]
        runner.launch(plan)
    return launches
