"""The commands of a client, over a real database and a real Redis."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import update

from protocol.requests import Answer, Failure, Result
from storage.answers import insert_answers
from storage.clock import now
from storage.jobs import cancel_job, close_job_if_done
from storage.leases import claim_next
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit
from storage.tables import jobs
from tests.cli.conftest import Invoke

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = '{"id": "a", "prompt": "Hello"}\nnonsense\n{"id": "c", "prompt": "Bye"}\n'


@pytest.fixture
def here(millrace: Invoke, database_url: str, redis_url: str, tmp_path: Path) -> Invoke:
    """The command line over this test's servers, in a folder with prompts."""
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    here = partial(millrace, database_url=database_url, broker_url=redis_url, model_name="tiny")
    assert here("migrate").exit_code == 0
    return here


@pytest.fixture
def answer(database_url: str) -> Callable[[], None]:
    """Do a worker's work on the oldest Chunk."""

    def answer() -> None:
        ledger = Ledger(database_url)
        lease = claim_next(ledger, ["tiny"], "worker", 60, min_age_s=0)
        assert lease is not None
        results = [
            Result(
                line=request.line,
                custom_id=request.custom_id,
                answer=Answer(text="yes", finish_reason="stop", prompt_tokens=1, completion_tokens=3),
            )
            for request in lease.requests
        ]
        commit(ledger, [ChunkCommit(lease, results, is_finished=True)])
        close_job_if_done(ledger, lease.job_id)
        ledger.close()

    return answer


def test_migrate_says_which_database_it_was_and_hides_the_password(millrace: Invoke, database_url: str) -> None:
    for _ in range(2):
        result = millrace("migrate", database_url=database_url)

        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith("the tables in ")
        assert result.stdout.endswith(" are up to date\n")
        password = database_url.partition("postgres:")[2].partition("@")[0]
        assert not password or password not in result.stdout


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


def test_status_of_a_job(here: Invoke, answer: Callable[[], None]) -> None:
    job_id = here("submit", "prompts.jsonl", "--job", "nightly").stdout.strip()
    answer()

    assert here("status", job_id[:6]).stdout == (
        f"job                 {job_id}\n"
        "name                nightly\n"
        "model               tiny\n"
        "state               finished\n"
        "lines               3\n"
        "answers             2, of them 0 known already\n"
        "errors              1\n"
        "requests waiting    0\n"
        "requests running    0\n"
        "prompt tokens       2\n"
        "output tokens       6, of them 6 computed\n"
    )


def test_status_as_json_has_the_counters_by_name(here: Invoke) -> None:
    job_id = here("submit", "prompts.jsonl").stdout.strip()

    (listed,) = map(json.loads, here("jobs", "--json").stdout.splitlines())

    assert (listed["id"], listed["state"], listed["num_requests_waiting"]) == (job_id, "running", 2)
    assert json.loads(here("status", job_id, "--json").stdout) == listed


def test_jobs_lists_the_newest(here: Invoke) -> None:
    first = here("submit", "prompts.jsonl", "--job", "first").stdout.strip()
    second = here("submit", "prompts.jsonl", "--job", "second").stdout.strip()

    lines = here("jobs").stdout.splitlines()

    assert [line.split()[0] for line in lines] == [second, first]
    assert lines[0].endswith("1 result of 3 lines  second")
    assert len(here("jobs", "--limit", "1").stdout.splitlines()) == 1


def test_lists_of_nothing_say_so_on_stderr(here: Invoke) -> None:
    jobs, letters = here("jobs"), here("dead-letters", "list")

    assert (jobs.exit_code, jobs.stdout, jobs.stderr) == (
        0,
        "",
        "there are no Jobs: `millrace submit FILE` makes one\n",
    )
    assert (letters.exit_code, letters.stdout, letters.stderr) == (0, "", "there are no dead letters\n")
    for command in (["jobs"], ["dead-letters", "list"]):
        assert here(*command, "--json").output == ""


def test_unknown_job_is_one_line_on_stderr(here: Invoke) -> None:
    for command in ("status", "results", "cancel", "delete"):
        result = here(command, "nothing")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("Error: there is no Job 'nothing'")


def test_results_go_to_stdout_or_into_a_file(here: Invoke, answer: Callable[[], None], tmp_path: Path) -> None:
    job_id = here("submit", "prompts.jsonl").stdout.strip()
    answer()

    shown = here("results", job_id)
    assert here("results", job_id, "-o", "out.jsonl").exit_code == 0

    assert [json.loads(line)["line"] for line in shown.stdout.splitlines()] == [1, 2, 3]
    assert (tmp_path / "out.jsonl").read_text() == shown.stdout


def test_partial_results_do_not_wait(here: Invoke) -> None:
    job_id = here("submit", "prompts.jsonl").stdout.strip()

    assert [json.loads(line)["line"] for line in here("results", job_id, "--partial").stdout.splitlines()] == [2]


def test_results_of_a_cancelled_job_end(here: Invoke, database_url: str) -> None:
    job_id = here("submit", "prompts.jsonl").stdout.strip()
    ledger = Ledger(database_url)
    cancel_job(ledger, job_id)
    ledger.close()

    assert len(here("results", job_id).stdout.splitlines()) == 1
    assert "the Job was cancelled" in here("submit", "prompts.jsonl", "-o", "out.jsonl").stderr


def test_cancel_stops_jobs_and_says_what_stays(here: Invoke) -> None:
    first = here("submit", "prompts.jsonl", "--job", "first").stdout.strip()
    second = here("submit", "prompts.jsonl", "--job", "second").stdout.strip()

    result = here("cancel", first[:8], "second")

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "".join(f"cancelled the Job {job_id}, keeping 1 result\n" for job_id in (first, second))
    again = here("cancel", "first")
    assert (again.exit_code, again.stdout) == (0, f"the Job {first} has ended already: it is cancelled\n")
    assert json.loads(here("cancel", "first", "--json").stdout) == {
        "id": first,
        "is_cancelled": False,
        "state": "cancelled",
        "num_results": 1,
    }


def test_a_stopped_command_leaves_no_half_of_a_file(
    here: Invoke, answer: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = here("submit", "prompts.jsonl").stdout.strip()
    answer()
    before = sorted(os.listdir())
    stopping = iter((signal.SIGTERM, signal.SIGHUP))
    monkeypatch.setattr("cli.output.Output.write", lambda *_: os.kill(os.getpid(), next(stopping)))

    for command in (["results", job], ["submit", "prompts.jsonl", "--wait"]):
        assert here(*command, "-o", "results.jsonl").exit_code == 130
    assert sorted(os.listdir()) == before


def test_places_for_results_need_a_wait_for_them(here: Invoke) -> None:
    for option in (["--errors", "errors.jsonl"], ["--format", "openai"], ["--order", "finished"]):
        refused = here("submit", "prompts.jsonl", "--wait", *option)
        assert refused.exit_code == 2
        assert "--errors, --format and --order go with -o" in refused.stderr
    assert here("jobs").stdout == ""


def test_delete_refuses_what_runs_unless_forced(here: Invoke, answer: Callable[[], None]) -> None:
    job_id = here("submit", "prompts.jsonl", "--job", "first").stdout.strip()
    second = here("submit", "prompts.jsonl", "--job", "second").stdout.strip()
    answer()

    refused = here("delete", "second")
    assert refused.exit_code == 1
    assert refused.stderr.endswith("is running: cancel it first, or wait for its end\n")
    assert here("delete", "first", "nothing").exit_code == 1
    done = here("delete", "first", job_id)
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"deleted the Job {job_id} with 3 results\n", "")
    assert json.loads(here("delete", "second", "--force", "--json").stdout) == {"id": second, "num_results": 1}
    assert here("jobs").stdout == ""
    assert here("delete", "second").exit_code == 1


def test_prune_deletes_what_is_old(here: Invoke, answer: Callable[[], None], database_url: str) -> None:
    here("submit", "prompts.jsonl", "--job", "old")
    answer()
    here("submit", "prompts.jsonl", "--job", "young")
    ledger = Ledger(database_url)
    longer_ago = update(jobs).where(jobs.c.identity == "old").values(ended_at=now() - 31 * 86_400)
    ledger.write(lambda connection: connection.execute(longer_ago))
    known = Answer(text="yes", finish_reason="stop", prompt_tokens=1, completion_tokens=3)
    ledger.write(lambda connection: insert_answers(connection, {bytes(32): known}))

    assert here("prune", "--older-than", "32d").stdout == "deleted 0 Jobs with 0 results\n"
    both = ["prune", "--older-than", "30d", "--answers-older-than", "0d"]
    assert here(*both, "--dry-run").stdout == "would delete 1 Job with 3 results\nwould delete 1 answer of 35 B\n"
    expected = {"num_jobs": 1, "num_results": 3, "num_answers": 1, "answer_bytes": 35}
    assert json.loads(here(*both, "--dry-run", "--json").stdout) == {"is_dry_run": True, **expected}
    done = here(*both)
    ledger.close()

    assert (done.exit_code, done.stderr) == (0, "")
    lines = ["deleted 1 Job with 3 results", "deleted 1 answer of 35 B"]
    if database_url.startswith("sqlite"):
        lines.append("the database's file keeps its size: what became free in it is used again")
    assert done.stdout.splitlines() == lines
    assert [line.split()[-1] for line in here("jobs").stdout.splitlines()] == ["young"]


def test_prune_wants_to_be_told_what_may_go(here: Invoke) -> None:
    nothing = here("prune")
    assert (nothing.exit_code, nothing.stdout) == (2, "")
    assert "say what may go: --older-than AGE for Jobs" in nothing.stderr
    for length in ("30", "d", "-1d", "1y", ""):
        unreadable = here("prune", "--older-than", length)
        assert unreadable.exit_code == 2
        assert "is no length of time: give a number with its unit, as in 30d" in unreadable.stderr


def test_broker_that_is_away_is_a_warning(here: Invoke) -> None:
    result = here("submit", "prompts.jsonl", broker_url="redis://127.0.0.1:1/0")

    assert result.exit_code == 0
    assert result.stderr.startswith("warning: Redis at redis://127.0.0.1:1/0 does not answer: ")


def test_commands_that_need_tables_say_how_to_make_them(millrace: Invoke, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    needing = [
        ["jobs"],
        ["status", "x"],
        ["results", "x"],
        ["cancel", "x"],
        ["delete", "x"],
        ["submit", "prompts.jsonl"],
    ]
    for arguments in [*needing, ["prune", "--older-than", "1d"]]:
        result = millrace(*arguments)
        assert result.exit_code == 1
        assert result.stderr == "Error: there is no database at millrace.db: create it with `millrace migrate`\n"


def test_verify_proves_a_finished_job_and_its_file_and_names_what_is_wrong_with_another(
    here: Invoke, answer: Callable[[], None], tmp_path: Path
) -> None:
    job = here("submit", "prompts.jsonl").stdout.strip()
    early = here("verify", job)
    assert (early.exit_code, "only a finished one can be verified" in early.stderr) == (1, True)
    answer()
    here("results", job, "-o", "results.jsonl")

    proven = here("verify", job, "results.jsonl")

    assert (proven.exit_code, proven.stderr) == (0, "")
    lines = proven.stdout.splitlines()
    assert lines[:2] == ["lines    3", "results  3, of them 1 error and 0 known already"]
    assert lines[3:] == ["complete: as the job was closed", "results.jsonl: all 3 results, each once and unaltered"]

    here("results", job, "-o", "answers.jsonl.gz", "--errors", "errors.jsonl.zst", "--order", "finished")
    apart = here("verify", job, "answers.jsonl.gz", "errors.jsonl.zst")
    assert apart.stdout.splitlines()[4] == (
        "answers.jsonl.gz, errors.jsonl.zst: all 3 results, each once and unaltered"
    )
    assert here("verify", job, "answers.jsonl.gz").exit_code == 1

    first, second, third = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text(second.replace("invalid_json", "other") + first + first)
    wrong = here("verify", job, "other.jsonl", "--json")
    assert wrong.exit_code == 1
    report = json.loads(wrong.stdout)
    assert report["holds"] is False
    assert report["stated"] == report["found"]
    wanted = {"num_rows": 3, "num_missing": 1, "num_altered": 1, "num_surplus": 1, "lines": [1, 2, 3]}
    assert report["file"] == wanted
    assert third


def test_dead_letters_are_listed_shown_dropped_and_replayed_by_job_and_line(here: Invoke, database_url: str) -> None:
    job = here("submit", "prompts.jsonl").stdout.strip()
    with closing(Ledger(database_url)) as ledger:
        lease = claim_next(ledger, ["tiny"], "worker", 60, min_age_s=0)
        assert lease is not None
        failure = Failure("engine_died", "the engine died of it")
        commit(ledger, [ChunkCommit(lease, [Result(line=line, failure=failure) for line in (1, 3)], is_finished=True)])
        close_job_if_done(ledger, lease.job_id)

    listed = here("dead-letters", "list", job).stdout.splitlines()
    found = [line.partition(", sample 0  ")[0] for line in listed]
    assert sorted(found) == [f"{job}  line {number}" for number in (1, 3)]
    assert all(line.endswith("  engine_died: the engine died of it") for line in listed)
    shown = json.loads(here("dead-letters", "show", job, "3").stdout)
    assert (shown["request"]["prompt"], [each["line"] for each in shown["samples"]]) == ("Bye", [3])
    missing = here("dead-letters", "show", job, "2")
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)

    assert here("dead-letters", "drop", job, "1").stdout == "1 dead letter dropped\n"
    assert [json.loads(line)["line"] for line in here("dead-letters", "list", "--json").stdout.splitlines()] == [3]
    replayed = here("dead-letters", "replay", job, "3")
    assert replayed.stdout == "1 result taken back to be computed again\n"
    assert here("dead-letters", "list").stdout == ""
    status = json.loads(here("status", job, "--json").stdout)
    assert (status["state"], status["num_error"]) == ("running", 2)


def test_results_go_where_and_how_they_are_asked_for(here: Invoke, answer: Callable[[], None], tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text('key,question\na,"Hello\nthere"\nb,\xff,\nc,Bye\n', encoding="latin-1")
    job = here("submit", "prompts.csv", "--prompt-column", "question", "--id-column", "key").stdout.strip()
    answer()

    asked = here("results", job, "-o", "results.jsonl", "--format", "openai", "--errors", "errors.csv")
    assert asked.exit_code == 1
    assert "OpenAI's format is JSON lines, not csv" in asked.stderr
    folder = here("results", job, "-o", "answers/")
    assert (folder.exit_code, "answers/: it is a folder, name a file in it" in folder.stderr) == (1, True)
    same = here("results", job, "-o", "results.jsonl", "--errors", "./results.jsonl")
    assert same.exit_code == 1
    assert "results and errors both go to results.jsonl" in same.stderr

    here("results", job, "-o", "results.jsonl", "--format", "openai", "--errors", "errors.jsonl.gz")
    here("results", job, "-o", "results.csv", "--order", "finished")
    stdout = here("results", job, "--errors", "errors.csv").stdout

    answers = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    errors = [json.loads(line) for line in gzip.decompress((tmp_path / "errors.jsonl.gz").read_bytes()).splitlines()]
    assert [line["custom_id"] for line in answers] == ["a", "c"]
    assert answers[0]["response"]["body"]["model"] == "tiny"
    assert answers[0]["response"]["body"]["choices"][0]["text"] == "yes"
    assert [line["response"]["body"]["error"]["code"] for line in errors] == ["invalid_csv"]
    assert [json.loads(line)["line"] for line in stdout.splitlines()] == [1, 3]
    assert len((tmp_path / "errors.csv").read_text().splitlines()) == 2
    assert [row.partition(",")[0] for row in (tmp_path / "results.csv").read_text().splitlines()] == [
        "line",
        "1",
        "2",
        "3",
    ]


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
