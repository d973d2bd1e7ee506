"""millrace tune: a table, a chart, and limits in the settings file that was there before."""

import os
import tomllib
from pathlib import Path

import pytest

from cli.settings_file import write_settings
from cli.tune import _pairs
from protocol.errors import ConfigurationError
from protocol.settings import load_settings
from tests.cli.conftest import Invoke
from worker.engine.tuning import Point, best_of

BUNDLED = Path(__file__).parents[2] / "models" / "millrace-tiny"


def test_tune_measures_draws_and_writes_what_is_best(
    millrace: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (BUNDLED / "model.safetensors").is_file() and os.environ.get("CI") != "true":
        pytest.skip("models/millrace-tiny has no weights here")
    (tmp_path / "millrace.toml").write_text('# ours\nmodel_name = "small"  # kept\n\n[engine]\nkv_tokens = 2048\n')

    result = millrace(
        "tune", BUNDLED, "--sequences", "2,8", "--tokens", "4,64", "--length", "16", "--seconds", "0.2",
        engine_num_threads="1", engine_max_num_seqs="9",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    assert "MILLRACE_ENGINE_MAX_NUM_SEQS is set and wins over the file" in result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [(int(row[0]), int(row[1])) for row in rows] == [(2, 4), (2, 64), (8, 64)]
    assert all(float(value) > 0 for row in rows for value in row)
    text = (tmp_path / "millrace.toml").read_text()
    assert text.startswith('# ours\nmodel_name = "small"  # kept\n')
    chosen = load_settings().engine
    assert (chosen.max_num_seqs, chosen.max_batch_tokens) in [(2, 4), (2, 64), (8, 64)]
    assert chosen.kv_tokens == 2048
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--sequences", "many", "'many' is no list of whole numbers from 1 to 65,536"),
        ("--sequences", "4,65537", "'4,65537' is no list of whole numbers from 1 to 65,536"),
        ("--tokens", "0", "'0' is no list of whole numbers from 1 to 2,147,483,647"),
        ("--seconds", "nan", "nan is out of range: it must be from 0.01 to 86,400"),
        ("--seconds", "inf", "inf is out of range"),
    ],
)
def test_tune_refuses_what_no_setting_could_hold_and_no_one_would_wait_for(
    millrace: Invoke, option: str, value: str, said: str
) -> None:
    result = millrace("tune", option, value)
    assert result.exit_code == 2
    assert said in result.output


def test_tune_says_which_limits_leave_nothing_to_measure() -> None:
    assert _pairs([2, 8], [4, 64]) == [(2, 4), (2, 64), (8, 64)]
    with pytest.raises(ConfigurationError, match="600 Sequences and more do not fit into steps of 512 tokens"):
        _pairs([700, 600], [512, 64])


def test_tune_refuses_models_of_another_task(millrace: Invoke, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    (tmp_path / "model.safetensors").touch()
    result = millrace("tune", tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{tmp_path} is a model to classify" in result.stderr


@pytest.mark.parametrize("option", ["--chart", "--settings"])
def test_tune_measures_nothing_that_it_could_not_write_down(millrace: Invoke, option: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("nowhere/x", "file/x"):
        result = millrace("tune", BUNDLED, option, place)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == f"Error: cannot write {place}: name a file where you may write with {option} FILE\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[engine\n", "the settings file ours.toml is not valid TOML: "),
        ("[engine]\nx = 1\nx = 2\n", "the settings file ours.toml is not valid TOML: "),
        ("engine = 5\n", "the settings file ours.toml sets 'engine' to a value: it is a table, [engine]"),
    ],
)
def test_tune_measures_nothing_for_a_settings_file_that_is_broken(
    millrace: Invoke, text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "ours.toml").write_text(text)

    result = millrace("tune", BUNDLED, "--settings", "ours.toml")

    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith(f"Error: {said}")
    assert (tmp_path / "ours.toml").read_text() == text


def test_of_nearly_equal_throughput_the_lower_latency_is_best() -> None:
    slow = Point(1024, 8192, 1000.0, 2000.0, 40.0, 50.0, 1)
    quick = Point(256, 8192, 985.0, 2000.0, 10.0, 20.0, 1)
    idle = Point(64, 8192, 500.0, 1000.0, 2.0, 3.0, 1)
    assert best_of([slow, quick, idle]) is quick


def test_settings_are_written_into_a_new_file_and_never_into_a_broken_one(tmp_path: Path) -> None:
    write_settings(tmp_path / "new.toml", "engine", {"max_num_seqs": 5})
    assert tomllib.loads((tmp_path / "new.toml").read_text()) == {"engine": {"max_num_seqs": 5}}

    (tmp_path / "broken.toml").write_text("[engine\n")
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        write_settings(tmp_path / "broken.toml", "engine", {"max_num_seqs": 5})
    assert (tmp_path / "broken.toml").read_text() == "[engine\n"


def test_settings_are_written_to_where_a_link_points_and_stay_their_owners_secret(tmp_path: Path) -> None:
    file, link = tmp_path / "real.toml", tmp_path / "link.toml"
    file.write_text('broker_url = "redis://:secret@host"\n')
    file.chmod(0o600)
    link.symlink_to(file)

    write_settings(link, "engine", {"max_num_seqs": 5})

    assert link.is_symlink()
    assert tomllib.loads(file.read_text())["engine"] == {"max_num_seqs": 5}
    assert file.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.toml", "real.toml"]
