"""`millrace submit`, over a real database and a real Redis."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import PROMPTS, Invoke

ROOT = Path(__file__).resolve().parents[2]


def test_submit_prints_the_jobs_id_and_finds_it_again(here: Invoke) -> None:
    first, second = here("submit", "prompts.jsonl"), here("submit", "prompts.jsonl")

    assert (first.exit_code, first.stderr) == (0, "")
    assert len(first.stdout.strip()) == 16
    assert second.stdout == first.stdout


def test_submit_takes_stdin_under_a_name_alone(here: Invoke) -> None:
    refused = here("submit", "-", stdin=PROMPTS)
    assert refused.exit_code == 1
    assert "--job NAME" in refused.stderr

    assert here("submit", "-", "--job", "nightly", stdin=PROMPTS).exit_code == 0
    assert json.loads(here("status", "nightly", "--json").stdout)["num_lines"] == 3


def test_submit_with_other_options_under_the_same_name_is_refused(here: Invoke) -> None:
    assert here("submit", "prompts.jsonl", "--job", "nightly").exit_code == 0

    refused = here("submit", "prompts.jsonl", "--job", "nightly", "--n", "2")

    assert refused.exit_code == 1
    assert "give this one another name" in refused.stderr


def test_submit_waits_and_writes_the_results(here: Invoke, answer: Callable[[], None], tmp_path: Path) -> None:
    here("submit", "prompts.jsonl")
    answer()

    result = here("submit", "prompts.jsonl", "-o", "out.jsonl")

    assert result.exit_code == 0
    assert result.stderr.startswith("3 results: 2 answers, 1 error (invalid_json 1)\n")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["line"], row["custom_id"], row["text"]) for row in rows] == [
        (1, "a", "yes"),
        (2, None, None),
        (3, "c", "yes"),
    ]


def test_submit_never_writes_over_its_input(here: Invoke, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to("prompts.jsonl")
    for output in ("prompts.jsonl", "link.jsonl"):
        refused = here("submit", "prompts.jsonl", "--wait", "-o", output)

        assert (refused.exit_code, refused.stdout) == (1, "")
        assert refused.stderr == f"Error: the output {output} is the input itself: give it another name\n"
    assert (tmp_path / "prompts.jsonl").read_text() == PROMPTS
    assert here("jobs").stdout == ""


def test_output_that_cannot_be_written_is_refused_before_there_is_a_job(here: Invoke, tmp_path: Path) -> None:
    refused = here("submit", "prompts.jsonl", "-o", "prompts.jsonl/out.jsonl")

    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"Error: cannot write the results to {tmp_path}/prompts.jsonl/out.jsonl: {tmp_path}/prompts.jsonl is a file, "
        "not a folder: name another file\n"
    )
    assert here("jobs").stdout == ""


def test_input_that_is_not_there_makes_no_job(here: Invoke) -> None:
    for arguments in (["nothing.jsonl"], ["nothing.jsonl", "--job", "nightly"]):
        refused = here("submit", *arguments)

        assert refused.exit_code == 1
        assert refused.stderr == "Error: cannot read the input nothing.jsonl: No such file or directory\n"
    assert here("jobs").stdout == ""


def test_submit_writes_results_to_stdout_and_all_else_to_stderr(
    here: Invoke, answer: Callable[[], None], tmp_path: Path
) -> None:
    job_id = here("submit", "prompts.jsonl").stdout.strip()
    answer()

    result = here("submit", "prompts.jsonl", "-o", "-")

    assert result.exit_code == 0
    assert [json.loads(line)["line"] for line in result.stdout.splitlines()] == [1, 2, 3]
    assert result.stderr.startswith(f"{job_id}\n3 results: ")
    assert "written to stdout" in result.stderr
    assert not (tmp_path / "-").exists()


def test_submit_under_the_name_of_a_complete_job_says_that_the_input_is_not_read(
    here: Invoke, answer: Callable[[], None], tmp_path: Path
) -> None:
    here("submit", "prompts.jsonl", "--job", "nightly")
    answer()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Something else"}\n')

    again = here("submit", "prompts.jsonl", "--job", "nightly")

    assert again.exit_code == 0
    assert again.stderr == "the Job 'nightly' has all its lines: the input is not read again\n"


def test_job_without_any_answer_is_exit_code_1_for_those_who_wait(here: Invoke, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("nonsense\n")

    assert here("submit", "bad.jsonl").exit_code == 0
    for arguments in (["--wait"], ["-o", "out.jsonl"]):
        result = here("submit", "bad.jsonl", *arguments)
        assert result.exit_code == 1
        assert "Error: no line was answered, there is nothing but errors (1)" in result.stderr


def test_no_empty_name_and_no_negative_limit(here: Invoke) -> None:
    nameless = here("status", "")
    assert (nameless.exit_code, nameless.stdout) == (1, "")
    assert nameless.stderr.startswith("Error: there is no Job ''")

    negative = here("jobs", "--limit", "-1")
    assert (negative.exit_code, negative.stdout) == (2, "")
    assert "-1 is not in the range 1<=x<=1000000" in negative.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_stdout_on_a_full_disk_is_one_line_on_stderr(
    here: Invoke, answer: Callable[[], None], database_url: str, redis_url: str
) -> None:
    job_id = here("submit", "prompts.jsonl").stdout.strip()
    answer()
    settings = {"DATABASE_URL": database_url, "BROKER_URL": redis_url, "MODEL_NAME": "tiny"}
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **{f"MILLRACE_{name}": text for name, text in settings.items()}}

    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-P", "-m", "cli.main", "results", job_id]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environ)

    assert (done.returncode, done.stderr) == (
        1,
        "Error: cannot write the results to stdout: No space left on device\n",
    )


def test_a_stopped_command_leaves_no_half_of_a_file(
    here: Invoke, answer: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = here("submit", "prompts.jsonl").stdout.strip()
    answer()
    before = sorted(os.listdir())
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup
    stopping = iter((signal.SIGTERM, signal.SIGHUP))
    monkeypatch.setattr("cli.output.Output.write", lambda *_: os.kill(os.getpid(), next(stopping)))

    for command in (["results", job], ["submit", "prompts.jsonl", "--wait"]):
        assert here(*command, "-o", "results.jsonl").exit_code == 130
    signal.signal(signal.SIGHUP, ignored)
    assert sorted(os.listdir()) == before


def test_places_for_results_need_a_wait_for_them(here: Invoke) -> None:
    for option in (["--errors", "errors.jsonl"], ["--format", "openai"], ["--order", "finished"]):
        refused = here("submit", "prompts.jsonl", "--wait", *option)
        assert refused.exit_code == 2
        assert "--errors, --format and --order go with -o" in refused.stderr
    assert here("jobs").stdout == ""


def test_broker_that_is_away_is_a_warning(here: Invoke) -> None:
    result = here("submit", "prompts.jsonl", broker_url="redis://127.0.0.1:1/0")

    assert result.exit_code == 0
    assert result.stderr.startswith("warning: Redis at redis://127.0.0.1:1/0 does not answer: ")


def test_stdin_and_stdout_take_any_format_they_are_told(
    here: Invoke, answer: Callable[[], None], tmp_path: Path
) -> None:
    arguments = ("submit", "-", "--job", "mine", "--input-format", "csv", "-o", "out.jsonl", "--errors", "-")
    here(*arguments[:6], stdin="prompt\nHello\nBye,bye\n")
    answer()

    result = here(*arguments, stdin="")

    assert [json.loads(line)["line"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [1]
    assert [json.loads(line)["error"]["code"] for line in result.stdout.splitlines()] == ["invalid_csv"]
    assert "written to out.jsonl, errors to stdout" in result.stderr


def test_missing_column_makes_no_job_and_names_those_there_are(here: Invoke, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("key,question\na,Hello\n")

    refused = here("submit", "prompts.csv")

    assert refused.exit_code == 1
    assert "no column 'prompt' for the prompt: --prompt-column takes one of 'key', 'question'" in refused.stderr
    assert here("jobs").stdout == ""


def test_lines_may_ask_for_a_model_that_is_mapped_to_the_served_one(here: Invoke, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "model": "gpt-9"}\n{"prompt": "b", "model": "gpt-8"}\n')

    unknown = here("submit", "prompts.jsonl", "--model-map", "gpt-9=other")
    assert unknown.exit_code == 1
    assert "'gpt-9' is mapped to the model 'other', but the one that is served is 'tiny'" in unknown.stderr
    plain = here("submit", "prompts.jsonl").stdout.strip()
    mapped = here("submit", "prompts.jsonl", "--model-map", "gpt-9=tiny").stdout.strip()

    assert plain != mapped, "other lines are refused, so it is another Job"
    (refused,) = here("results", mapped, "--partial").stdout.splitlines()
    assert json.loads(refused)["line"] == 2
    assert "asks for model 'gpt-8', but this Job's is 'tiny'" in json.loads(refused)["error"]["message"]
    assert "--model-map gpt-8=tiny" in json.loads(refused)["error"]["message"]
    wrong = here("submit", "prompts.jsonl", "--model-map", "gpt-9")
    assert wrong.exit_code == 2
    assert "'gpt-9' is not of the form ASKED=SERVED" in wrong.stderr
