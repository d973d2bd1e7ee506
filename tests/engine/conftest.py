"""Tiny models on disk and their reference texts, made once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.families import FAMILIES
from tests.engine.reference import Reference, build_model, make_reference, random_prompts


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            build_model(family).save_pretrained(folders[family])
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def reference(model_folder: Callable[[str], Path]) -> Callable[[str], Reference]:
    references: dict[str, Reference] = {}

    def get(family: str) -> Reference:
        if family not in references:
            prompts = random_prompts(26, seed=1, max_len=FAMILIES[family].max_prompt)
            references[family] = make_reference(model_folder(family), prompts, num_tokens=40)
        return references[family]

    return get
