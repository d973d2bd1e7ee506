"""A whole engine on the Triton backend. Run by tests/engine/test_kernels.py, where kernels are interpreted."""

from pathlib import Path
from typing import Any

import pytest

from batching import shared_prefixes
from tests.engine.reference import (
    assert_equal_where_decided,
    build_model,
    drive,
    make_reference,
    new_sequence,
    random_prompts,
    settings_for,
)
from worker.engine import engine as engine_module
from worker.engine.backends.triton import TritonBackend
from worker.engine.engine import Engine


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])  # the second has windows and a softcap
def test_text_of_the_triton_backend_equals_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_model(family).save_pretrained(tmp_path)
    stem = random_prompts(1, seed=5, max_len=140)[0] * 3
    ends = random_prompts(3, seed=6, max_len=20)
    prompts = [*(stem[:66] + end for end in ends), *random_prompts(1, seed=7, max_len=60)]
    expected = make_reference(tmp_path, prompts, num_tokens=4)
    monkeypatch.setattr(engine_module, "choose_backend", lambda *arguments: TritonBackend())
    monkeypatch.setattr(shared_prefixes, "_MIN_SAVED_TOKENS", 1)
    monkeypatch.setattr(shared_prefixes, "_MIN_SAVED_SHARE", 0)
    num_grouped: list[int] = []
    own_decode = TritonBackend.decode

    def decode(self: Any, query: Any, k_cache: Any, v_cache: Any, step: Any, terms: Any) -> Any:
        if step.prefixes is not None:
            num_grouped.append(int((step.prefixes.starts > 0).sum()))
        return own_decode(self, query, k_cache, v_cache, step, terms)

    monkeypatch.setattr(TritonBackend, "decode", decode)
    engine = Engine.start(settings_for(tmp_path, lookahead=1))

    run = drive(engine, [new_sequence(i, prompt, 4) for i, prompt in enumerate(prompts)], wave=7)

    assert engine.attention_name == "triton"
    assert run.num_prefix_hit_tokens == 2 * 64
    assert max(num_grouped) == 3
    assert_equal_where_decided([run.outputs[i] for i in range(len(prompts))], expected)
