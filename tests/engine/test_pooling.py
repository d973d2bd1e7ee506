"""Embeddings and classifications in a batch equal those of one text at a time, whatever the family and the layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from batching.whole import WholePlan
from protocol.errors import ConfigurationError
from protocol.frames import NewSequence
from tests.engine.pooled_families import (
    FAMILIES,
    VOCAB_SIZE,
    build,
    drive,
    load,
    plain_embedding,
    plain_probabilities,
)
from tests.engine.reference import random_prompts, settings_for
from worker.engine.pooling_engine import PoolingEngine
from worker.engine.pooling_runner import VectorsHandle
from worker.engine.task import choose_task

#: Without the first ids: what stands for padding has no place in a text.
TEXTS = [[5 + token for token in ids] for ids in random_prompts(30, seed=3, max_len=70, vocab_size=VOCAB_SIZE - 5)]
CLASSIFIER = "AutoModelForSequenceClassification"
LABELS = {0: "bad", 1: "fair", 2: "good"}

Folder = Callable[..., Path]


@pytest.fixture(scope="session")
def pooled_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folders: dict[tuple[str, str], Path] = {}

    def folder(family: str, auto_class: str = "AutoModel") -> Path:
        if (family, auto_class) not in folders:
            changes = (
                {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}} if auto_class == CLASSIFIER else {}
            )
            path = folders[family, auto_class] = tmp_path_factory.mktemp(f"pooled-{family}")
            build(family, auto_class, **changes).save_pretrained(path)
        return folders[family, auto_class]

    return folder


def start(folder: Path, **changes: Any) -> PoolingEngine:
    settings = settings_for(folder, **{"max_batch_tokens": 200, **changes})
    task = choose_task(folder, settings)
    assert task != "generate"
    return PoolingEngine.start(settings, task)


def assert_embeddings(engine: PoolingEngine, model: Any, pooling: str, *, is_normalized: bool = True) -> None:
    vectors = drive(engine, TEXTS)
    assert len(vectors) == len(TEXTS)
    for number, text in enumerate(TEXTS):
        expected = plain_embedding(model, text, pooling)
        if is_normalized:
            expected = torch.nn.functional.normalize(expected, dim=0)
        assert np.abs(vectors[number] - expected.numpy()).max() < 1e-4 * max(1, float(expected.norm()))


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_equal_transformers_one_at_a_time(family: str, pooled_folder: Folder) -> None:
    folder, stated = pooled_folder(family), FAMILIES[family]
    engine = start(folder)

    assert (engine.pooled.layout, engine.pooled.pooling) == (stated.layout, stated.pooling)
    assert_embeddings(engine, load(folder), stated.pooling)


def test_a_model_whose_positions_have_no_end_takes_texts_of_the_length_that_is_set(tmp_path: Path) -> None:
    config = transformers.XLNetConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layer=2, n_head=4, d_inner=64)
    transformers.XLNetModel(config).save_pretrained(tmp_path)

    with pytest.raises(ConfigurationError, match=r"set engine\.max_model_len to its context length"):
        start(tmp_path)
    engine = start(tmp_path, max_model_len=128, pooling="mean")

    assert engine.pooled.max_model_len == 128
    assert_embeddings(engine, transformers.XLNetModel.from_pretrained(tmp_path).eval(), "mean")


def test_a_model_with_attention_of_its_own_keeps_the_one_that_transformers_chose(tmp_path: Path) -> None:
    """Falcon's plain attention adds its biases for distance twice."""
    torch.manual_seed(0)
    fields = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.FalconConfig(**fields, alibi=True, initializer_range=0.3)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)

    engine = start(tmp_path, task="embed", max_model_len=128)

    assert_embeddings(engine, transformers.AutoModel.from_pretrained(tmp_path).eval(), "last")


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_every_pooling_in_every_layout(layout: str, pooling: str, pooled_folder: Folder) -> None:
    for family in ("bert", "qwen3"):
        engine = start(pooled_folder(family), layout=layout, pooling=pooling, normalize=False)

        assert engine.pooled.layout == layout
        assert_embeddings(engine, load(pooled_folder(family)), pooling, is_normalized=False)


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "modernbert", "llama", "qwen2", "mpnet", "deberta", "bloom"]
)
def test_classifications_equal_transformers_one_at_a_time(family: str, pooled_folder: Folder) -> None:
    folder = pooled_folder(family, CLASSIFIER)
    engine, model = start(folder), load(folder, CLASSIFIER)

    vectors = drive(engine, TEXTS)

    assert engine.pooled.layout == FAMILIES[family].layout
    assert engine.ready().labels == ("bad", "fair", "good")
    for number, text in enumerate(TEXTS):
        assert np.abs(vectors[number] - plain_probabilities(model, text).numpy()).max() < 1e-5
    assert len({int(v.argmax()) for v in vectors.values()}) > 1


def test_a_head_that_averages_all_tokens_is_found_too(tmp_path: Path) -> None:
    build("modernbert", CLASSIFIER, classifier_pooling="mean", num_labels=3).save_pretrained(tmp_path)
    engine, model = start(tmp_path), load(tmp_path, CLASSIFIER)

    assert engine.pooled.pooling == "mean"
    for number, vector in drive(engine, TEXTS).items():
        assert np.abs(vector - plain_probabilities(model, TEXTS[number]).numpy()).max() < 1e-5


def test_one_label_and_many_at_once_have_probabilities_of_their_own(tmp_path: Path) -> None:
    build("bert", CLASSIFIER, num_labels=3, problem_type="multi_label_classification").save_pretrained(tmp_path)
    engine, model = start(tmp_path), load(tmp_path, CLASSIFIER)

    vectors = drive(engine, TEXTS[:3])

    with torch.inference_mode():
        expected = model(torch.tensor([TEXTS[0]])).logits[0].sigmoid()
    assert np.abs(vectors[0] - expected.numpy()).max() < 1e-5


def test_a_language_model_embeds_where_the_settings_say_so(tmp_path: Path) -> None:
    build("qwen3", "AutoModelForCausalLM").save_pretrained(tmp_path)
    assert choose_task(tmp_path, settings_for(tmp_path)) == "generate"

    engine = start(tmp_path, task="embed")

    assert_embeddings(engine, load(tmp_path), "last")


def test_an_encoder_trained_on_masks_embeds_without_its_head(tmp_path: Path) -> None:
    build("bert", "AutoModelForMaskedLM").save_pretrained(tmp_path)

    assert_embeddings(start(tmp_path), load(tmp_path), "mean")


class TestSentenceTransformersFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        build("bert").save_pretrained(tmp_path)
        self.write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 64})
        self.write(
            tmp_path, "1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
        )
        self.modules(tmp_path, "Transformer", "Pooling")
        return tmp_path

    def write(self, folder: Path, name: str, content: Any) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))

    def modules(self, folder: Path, *kinds: str) -> None:
        paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
        entries = [{"path": paths[kind], "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
        self.write(folder, "modules.json", entries)

    def test_say_how_tokens_become_an_embedding(self, folder: Path) -> None:
        engine = start(folder)

        assert (engine.pooled.pooling, engine.pooled.is_normalized, engine.pooled.max_model_len) == ("cls", False, 64)
        self.modules(folder, "Transformer", "Pooling", "Normalize")
        engine = start(folder, max_model_len=100)
        assert (engine.pooled.is_normalized, engine.pooled.max_model_len) == (True, 100)
        assert start(folder, pooling="mean", normalize=False).pooled.description == "embed mean"

    def test_are_embedding_models_also_where_their_config_names_a_language_model(self, tmp_path: Path) -> None:
        build("qwen3", "AutoModelForCausalLM").save_pretrained(tmp_path)
        self.write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "lasttoken"})
        self.modules(tmp_path, "Transformer", "Pooling", "Normalize")

        assert start(tmp_path).pooled.description == "embed last normalized"

    def test_with_modules_that_are_not_computed_are_refused(self, folder: Path) -> None:
        self.modules(folder, "Transformer", "Pooling", "Dense")
        with pytest.raises(ConfigurationError, match=r"modules\.json asks for a module 'Dense'"):
            start(folder)

    def test_with_a_pooling_that_is_not_computed_are_refused(self, folder: Path) -> None:
        self.write(folder, "1_Pooling/config.json", {"pooling_mode_max_tokens": True})
        with pytest.raises(ConfigurationError, match="asks for the pooling pooling_mode_max_tokens"):
            start(folder)
        assert start(folder, pooling="mean").pooled.pooling == "mean"


def test_the_fingerprint_tells_tasks_and_poolings_apart(pooled_folder: Folder) -> None:
    folder = pooled_folder("bert")
    prints = {start(folder, **changes).fingerprint for changes in ({}, {"pooling": "cls"}, {"normalize": False})}
    assert len(prints) == 3


def test_what_fits_no_step_or_is_not_this_engines_task_is_refused_alone(pooled_folder: Folder) -> None:
    engine = start(pooled_folder("bert"), max_batch_tokens=50)
    texts = {1: [5] * 51, 2: [5, VOCAB_SIZE], 3: [5, 6], 4: [], 5: [5]}
    for seq_id, text in texts.items():
        ids = np.array(text, dtype="<i4").tobytes()
        engine.add(NewSequence(seq_id, ids, 7 if seq_id == 5 else 0, (), 0.0, 1.0, 0, 0, 0))

    frame = engine.step()

    assert frame is not None
    refused = dict(frame.refused)
    assert "51 tokens, over the limit of 50 (max_batch_tokens)" in refused[1]
    assert "outside the model's vocabulary of 300" in refused[2]
    assert "no tokens" in refused[4]
    assert "nothing but embed" in refused[5]
    assert [seq_id for seq_id, _ in frame.pooled] == [3]
    assert not engine.has_work


def test_a_small_job_does_not_wait_for_a_large_ones_end(pooled_folder: Folder) -> None:
    engine, text = start(pooled_folder("bert"), max_num_seqs=2), np.arange(5, 25, dtype="<i4").tobytes()
    for number in range(12):
        engine.add(NewSequence(number, text, 0, (), 0.0, 1.0, 0, 0, 0, job="large" if number < 10 else "small"))

    done = [frame.pooled for _ in range(3) if (frame := engine.step()) is not None]

    assert {10, 11} < {number for pooled in done for number, _ in pooled}


def test_gaps_are_counted_between_steps_but_not_while_there_is_nothing_to_do(pooled_folder: Folder) -> None:
    engine, text = start(pooled_folder("bert"), max_num_seqs=1), np.arange(5, 25, dtype="<i4").tobytes()

    def gaps(first: int) -> list[float]:
        for number in range(first, first + 3):
            engine.add(NewSequence(number, text, 0, (), 0.0, 1.0, 0, 0, 0))
        frames = [engine.step() for _ in range(3)]
        return [frame.host_gap_s for frame in frames if frame is not None]

    once, again = gaps(0), gaps(10)
    engine.add(NewSequence(20, text, 0, (), 0.0, 1.0, 0, 0, 0))
    engine.add(NewSequence(21, text, 0, (), 0.0, 1.0, 0, 0, 0))
    engine.step()
    engine.finish(21, 0)  # nothing is left
    after_cancelling = gaps(30)

    for found in (once, again, after_cancelling):
        assert found[0] == 0.0
        assert found[1] > 0.0
        assert found[2] > 0.0
    summary = engine.telemetry.summary()
    assert (summary["steps"], summary["rows_per_step"]) == (10, 1.0)


def test_models_that_do_neither_are_refused_with_the_reason(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"'t5' are not supported .* an encoder and a decoder"):
        start(tmp_path)
    assert choose_task(tmp_path, settings_for(tmp_path, task="generate")) == "generate"
    with pytest.raises(ConfigurationError, match=r"engine\.task='rank' is unknown"):
        choose_task(tmp_path, settings_for(tmp_path, task="rank"))


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_a_step_that_is_too_large_is_halved_and_one_text_alone_is_given_up(
    family: str, pooled_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pooled_folder(family)
    expected = drive(start(folder), TEXTS)
    engine, sizes, most = start(folder), [], 75
    launch = engine.runner.launch

    def launch_or_fail(plan: WholePlan) -> VectorsHandle:
        size = plan.num_scheduled_tokens + plan.num_padding_tokens
        if size > most:
            raise torch.OutOfMemoryError("as if it were")
        sizes.append(size)
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", launch_or_fail)
    vectors = drive(engine, TEXTS)

    for number in range(len(TEXTS)):
        np.testing.assert_allclose(vectors[number], expected[number], atol=1e-5)
    assert len(sizes) < len(TEXTS)
    most = 1
    with pytest.raises(torch.OutOfMemoryError, match="one text"):
        drive(engine, TEXTS)
