"""The commands of a client, over a real database and a real Redis."""

import gzip
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from sqlalchemy import update

from protocol.requests import Answer, Failure, Result
from storage.answers import insert_answers
from storage.clock import now
from storage.jobs import cancel_job, close_job_if_done
from storage.leases import claim_next
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit
from storage.tables import jobs
from tests.cli.conftest import PROMPTS, Invoke

ROOT = Path(__file__).resolve().parents[2]


def test_migrate_says_which_database_it_was_and_hides_the_password(millrace: Invoke, database_url: str) -> None:
    for _ in range(2):
        result = millrace("migrate", database_url=database_url)

        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith("the tables in ")
        assert result.stdout.endswith(" are up to date\n")
        password = database_url.partition("postgres:")[2].partition("@")[0]
        assert not password or password not in result.stdout


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


def test_delete_refuses_what_runs_unless_forced(here: Invoke, answer: Callable[[], None]) -> None:
    job_id = here("submit", "prompts.jsonl", "--job", "first").stdout.strip()
    second = here("submit", "prompts.jsonl", "--job", "second").stdout.strip()
    answer()

    refused = here("delete", "second")
    assert refused.exit_code == 1
    assert refused.stderr.endswith("is running: cancel it first, wait for its end, or give --force\n")
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

    here("results", job, "-o", "objects.jsonl", "--format", "openai")
    objects = here("verify", job, "objects.jsonl")
    assert objects.stdout.splitlines()[4] == "objects.jsonl: all 3 lines, each once and unaltered"

    first, second, third = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text(second.replace("invalid_json", "other") + first + first)
    wrong = here("verify", job, "other.jsonl", "--json")
    assert wrong.exit_code == 1
    report = json.loads(wrong.stdout)
    assert report["holds"] is False
    assert report["stated"] == report["found"]
    wanted = {"format": "flat", "num_rows": 3, "num_missing": 1, "num_altered": 1, "num_surplus": 1, "lines": [1, 2, 3]}
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
