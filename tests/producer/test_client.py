import base64
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from producer.client import Client
from protocol.celery_app import normal_queue
from protocol.errors import (
    ConfigurationError,
    DamagedInput,
    DatabaseUnavailable,
    InvalidRequest,
    JobNotFound,
    SubmissionConflict,
)
from protocol.requests import Answer, Failure, Result
from protocol.sampling import SamplingParams
from protocol.settings import EngineSettings, Settings
from storage.jobs import Job, cancel_job, close_job_if_done
from storage.leases import claim_next
from storage.ledger import Ledger
from storage.results import ChunkCommit, commit
from storage.takeover import Takeover
from tests.producer.conftest import MODEL, NOBODY_LISTENS, answer_oldest, lines_of
from tests.storage.samples import new_lease


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str) -> Path:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(line + "\n" for line in lines))
        return path

    return write


def plain(text: str) -> str:
    return json.dumps({"prompt": text})


def messages(redis_url: str, model: str = MODEL) -> list[dict[str, object]]:
    """The queue's messages, first published first."""
    with redis.Redis.from_url(redis_url) as server:
        return [json.loads(raw) for raw in reversed(server.lrange(normal_queue(model), 0, -1))]


def test_submit_cuts_the_lines_into_chunks_and_announces_each(
    client: Client, ledger: Ledger, redis_url: str, prompts: Callable[..., Path]
) -> None:
    job = client.submit(prompts(*(plain(f"p{number}") for number in range(10))))

    assert (job.state, job.num_lines, job.model) == ("running", 10, MODEL)
    bodies = [message["body"] for message in messages(redis_url)]
    assert len(bodies) == 3
    chunks = [new_lease(ledger, chunk_id, "worker", 60) for chunk_id in chunk_ids(redis_url)]
    assert [[request.prompt for request in chunk.requests] for chunk in chunks] == [
        ["p0", "p1", "p2", "p3"],
        ["p4", "p5", "p6", "p7"],
        ["p8", "p9"],
    ]


def chunk_ids(redis_url: str) -> list[int]:
    ids = []
    for message in messages(redis_url):
        assert message["content-type"] == "application/x-msgpack"
        args, _, _ = msgspec.msgpack.decode(base64.b64decode(str(message["body"])))
        ids += args
    return ids


def test_messages_carry_no_prompt(client: Client, redis_url: str) -> None:
    client.submit(["a secret"])

    (message,) = messages(redis_url)
    headers = message["headers"]
    assert isinstance(headers, dict)
    assert headers["argsrepr"] == f"({chunk_ids(redis_url)[0]},)"
    assert headers["task"] == "millrace.chunk"
    assert headers["ignore_result"] is True
    assert "secret" not in json.dumps(message)


def test_submitting_subscribes_to_nothing(client: Client, redis_url: str) -> None:
    client.submit([f"p{number}" for number in range(20)])

    with redis.Redis.from_url(redis_url) as server:
        assert server.pubsub_channels() == []


def test_chunk_is_bounded_by_the_bytes_of_its_text(settings: Settings, ledger: Ledger, redis_url: str) -> None:
    with Client(msgspec.structs.replace(settings, chunk_bytes=10)) as client:
        client.submit(["aaaa", "bbbb", "ccccccccccccccc", "ää", "eeee", "ffff"])

    chunks = [new_lease(ledger, chunk_id, "worker", 60) for chunk_id in chunk_ids(redis_url)]
    texts = [[request.prompt for request in chunk.requests] for chunk in chunks]
    assert texts == [["aaaa", "bbbb"], ["ccccccccccccccc"], ["ää", "eeee"], ["ffff"]]


def test_malformed_lines_have_their_results_at_once(client: Client, prompts: Callable[..., Path]) -> None:
    job = client.submit(prompts(plain("a"), "nonsense", "", plain("d"), '{"prompt": 5}', ""))

    status = client.status(job)
    assert (status.num_error, status.num_requests, status.num_lines) == (2, 2, 6)
    stored = list(client.results(job, wait=False))
    assert [(result.line, result.failure and result.failure.code) for result in stored] == [
        (2, "invalid_json"),
        (5, "invalid_type"),
    ]


def test_input_of_malformed_lines_alone_is_finished_at_once(client: Client, prompts: Callable[..., Path]) -> None:
    job = client.submit(prompts(*["nonsense"] * 10))

    assert job.state == "finished"
    assert lines_of(client.results(job)) == list(range(1, 11))


def test_empty_input_is_finished_at_once(client: Client, prompts: Callable[..., Path]) -> None:
    job = client.submit(prompts())

    assert (job.state, job.num_lines) == ("finished", 0)
    assert list(client.results(job)) == []


def test_same_input_again_is_the_same_job_and_publishes_nothing(
    client: Client, redis_url: str, prompts: Callable[..., Path]
) -> None:
    path = prompts(plain("a"))
    first = client.submit(path)

    assert client.submit(path).id == first.id
    assert client.submit(str(path)).id == first.id
    assert len(messages(redis_url)) == 1


def test_job_of_the_same_input_is_found_without_submitting(client: Client, prompts: Callable[..., Path]) -> None:
    path = prompts(plain("a"))
    assert client.find_same(path) is None
    job = client.submit(path)
    named = client.submit(path, name="nightly")

    assert client.find_same(path) == job
    assert client.find_same(path, name="nightly") == named
    assert client.find_same(path, name=job.id[:4]) is None
    assert client.find_same(path, params=SamplingParams(seed=1)) is None
    with pytest.raises(SubmissionConflict):
        client.find_same(path, name="nightly", params=SamplingParams(seed=1))


def test_other_content_parameters_or_model_make_another_job(
    settings: Settings, client: Client, prompts: Callable[..., Path]
) -> None:
    path = prompts(plain("a"))
    ids = {client.submit(path).id, client.submit(path, params=SamplingParams(seed=1)).id}
    with Client(msgspec.structs.replace(settings, model_name="other")) as other:
        ids.add(other.submit(path).id)
    ids.add(client.submit(prompts(plain("b"))).id)

    assert len(ids) == 4


def test_list_equals_the_file_that_says_the_same(client: Client, prompts: Callable[..., Path]) -> None:
    assert client.submit(["a"]).id == client.submit(prompts('{"prompt":"a"}')).id


def test_interrupted_submit_goes_on_after_the_last_chunk(
    client: Client, ledger: Ledger, redis_url: str, prompts: Callable[..., Path]
) -> None:
    path = prompts(*(plain(f"p{number}") for number in range(10)))

    class Interruption(Exception):
        pass

    def interrupt(last_line: int) -> None:
        if last_line == 8:
            raise Interruption

    with pytest.raises(Interruption):
        client.submit(path, on_progress=interrupt)
    (broken_off,) = client.jobs()
    assert (broken_off.state, client.status(broken_off).num_lines) == ("submitting", 8)

    job = client.submit(path)

    assert (job.id, job.state, job.num_lines) == (broken_off.id, "running", 10)
    assert len(messages(redis_url)) == 3
    assert [answer_oldest(ledger) for _ in range(3)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert lines_of(client.results(job)) == list(range(1, 11))


def test_input_that_can_be_read_only_once_needs_a_name(client: Client) -> None:
    with pytest.raises(ConfigurationError, match="--job NAME"):
        client.submit(io.BytesIO(b'{"prompt": "a"}\n'))
    with pytest.raises(ConfigurationError, match="--job NAME"):
        client.submit(text for text in ["a"])

    assert client.submit(io.BytesIO(b'{"prompt": "a"}\n'), name="nightly").num_lines == 1
    assert client.submit((text for text in ["a", "b"]), name="items").num_lines == 2
    assert client.find("nightly").identity == "nightly"


def test_name_that_stands_for_another_job_is_refused(client: Client) -> None:
    client.submit(["a"], name="nightly")

    differs = (
        r"the Job 'nightly' \([0-9a-f]{16}\) has no max_tokens, and here it is max_tokens=5: give the same, or give"
    )
    with pytest.raises(SubmissionConflict, match=differs):
        client.submit(["a"], name="nightly", params=SamplingParams(max_tokens=5))


def test_resumed_input_that_is_shorter_than_what_is_in_is_refused(client: Client) -> None:
    def items() -> Iterator[str]:
        yield from ["a"] * 5
        raise KeyError

    with pytest.raises(KeyError):
        client.submit(items(), name="nightly")

    with pytest.raises(SubmissionConflict, match="already has 4 lines, but this input has 2"):
        client.submit(["a", "b"], name="nightly")


def test_file_that_grows_while_it_is_read_is_gone_on_with_by_the_jobs_id(
    client: Client, prompts: Callable[..., Path]
) -> None:
    path = prompts(*(plain(f"p{number}") for number in range(5)))
    size = path.stat().st_size

    def change(_line: int) -> None:
        with path.open("a") as file:
            file.write(plain("more"))

    with pytest.raises(DamagedInput) as raised:
        client.submit(path, on_progress=change)

    (job,) = client.jobs()
    message, position = str(raised.value), client.status(job).num_lines
    assert f"{path} was changed while it was read: {size} bytes have become {path.stat().st_size}; " in message
    assert f"the lines up to {position} are in the Job {job.id}" in message
    assert f"--job {job.id} goes on behind them" in message
    again = client.submit(path, name=job.id)
    num_lines = len(path.read_text().splitlines())
    assert (again.id, again.num_lines, client.status(job).num_requests) == (job.id, num_lines, num_lines)
    assert client.submit(path, name=job.id) == again, "and nothing is taken in twice"


def test_missing_file_is_refused(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read the input .*nothing: No such file"):
        client.submit(tmp_path / "nothing")
    with pytest.raises(ConfigurationError, match="cannot read the input"):
        client.submit(tmp_path, name="folder")


def test_parameters_out_of_range_are_refused_before_a_job_is_made(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="n=0 is out of range"):
        client.submit(["a"], params=SamplingParams(n=0))

    assert client.jobs() == []


def test_what_is_no_class_and_no_limit_is_refused_by_name(client: Client) -> None:
    unknown: Any = "urgent"
    with pytest.raises(
        ConfigurationError, match="priority='urgent' is unknown: it is one of interactive, normal, bulk"
    ):
        client.submit(["a"], priority=unknown)
    assert client.jobs() == []
    with pytest.raises(ConfigurationError, match="limit=-1 is out of range"):
        client.jobs(-1)


def test_lines_may_ask_for_the_served_model_alone_unless_told_otherwise(
    client: Client, prompts: Callable[..., Path]
) -> None:
    path = prompts('{"prompt": "a", "model": "tiny"}', '{"prompt": "a", "model": "gpt-9"}')

    assert client.status(client.submit(path)).num_error == 1
    assert client.status(client.submit(path, name="other", model_names=("gpt-9", "tiny"))).num_error == 0


def test_results_come_in_the_order_of_the_input_though_chunks_finish_in_another(client: Client, ledger: Ledger) -> None:
    job = client.submit([f"p{number}" for number in range(8)])
    first = claim_next(ledger, [MODEL], "slow", 60, min_age_s=0)
    assert first is not None
    assert answer_oldest(ledger) == [5, 6, 7, 8]
    assert lines_of(client.results(job, wait=False)) == [5, 6, 7, 8]

    def finish(_status: object) -> None:
        results = [
            Result(
                line=request.line, answer=Answer(text="", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
            )
            for request in first.requests
        ]
        commit(ledger, [ChunkCommit(first, results, is_finished=True)])
        close_job_if_done(ledger, job.id)

    assert client.wait(job, on_progress=finish).is_finished
    assert lines_of(client.results(job)) == list(range(1, 9))


def test_results_arrive_while_the_job_runs(client: Client, ledger: Ledger) -> None:
    job = client.submit([f"p{number}" for number in range(8)])
    answer_oldest(ledger)

    results = client.results(job)

    assert [next(results).line for _ in range(4)] == [1, 2, 3, 4]
    answer_oldest(ledger)
    assert lines_of(results) == [5, 6, 7, 8]


def test_results_hold_back_what_comes_after_a_gap(client: Client, ledger: Ledger) -> None:
    job = client.submit([f"p{number}" for number in range(12)])
    claim_next(ledger, [MODEL], "slow", 60, min_age_s=0)
    answer_oldest(ledger)
    answer_oldest(ledger)

    cancel_job(ledger, job.id)  # the gap will never be filled, and the end of the Job ends the wait

    assert lines_of(client.results(job)) == list(range(5, 13))


def test_samples_come_in_order_across_pages(client: Client, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producer.job_results._PAGE", 3)
    job = client.submit([f"p{number}" for number in range(4)], params=SamplingParams(n=2))
    answer_oldest(ledger, num_samples=2)

    assert [(result.line, result.sample) for result in client.results(job)] == [
        (line, sample) for line in (1, 2, 3, 4) for sample in (0, 1)
    ]


def test_wait_returns_when_the_job_is_cancelled(client: Client, ledger: Ledger) -> None:
    job = client.submit(["a"])
    cancel_job(ledger, job.id)

    assert client.wait(job).job.state == "cancelled"


def test_job_whose_worker_died_before_closing_it_is_closed_by_whoever_waits(client: Client, ledger: Ledger) -> None:
    waited, read = client.submit(["a"], name="waited"), client.submit(["a"], name="read")
    answer_oldest(ledger, closes_job=False)
    answer_oldest(ledger, closes_job=False)

    assert client.wait(waited).is_finished
    assert lines_of(client.results(read)) == [1]


def test_jobs_are_found_by_id_prefix_and_name_and_only_by_their_tenant(settings: Settings, client: Client) -> None:
    job = client.submit(["a"], name="nightly")

    assert [client.find(name).id for name in (job.id, job.id[:6], "nightly")] == [job.id] * 3
    assert client.status("nightly").job.id == job.id
    assert [found.id for found in client.jobs()] == [job.id]
    with Client(msgspec.structs.replace(settings, tenant="other")) as stranger:
        assert stranger.jobs() == []
        with pytest.raises(JobNotFound):
            stranger.find("nightly")


def test_broker_that_is_away_costs_a_warning_and_no_chunk(
    settings: Settings, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        Client(msgspec.structs.replace(settings, broker_url=NOBODY_LISTENS)) as client,
        caplog.at_level(logging.WARNING, "millrace"),
    ):
        job = client.submit([f"p{number}" for number in range(12)])

    assert job.state == "running"
    (record,) = [record for record in caplog.records if record.name == "millrace.producer"]
    assert "Redis at redis://127.0.0.1:1/0 does not answer" in record.getMessage()
    assert "secret" not in caplog.text
    assert [answer_oldest(ledger) for _ in range(3)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


def test_announce_tells_a_new_broker_what_waits(
    settings: Settings, client: Client, ledger: Ledger, redis_url: str
) -> None:
    job = client.submit([f"p{number}" for number in range(12)])
    answer_oldest(ledger)
    with redis.Redis.from_url(redis_url) as server:
        server.flushall()

    client.announce(job)

    assert [new_lease(ledger, chunk_id).requests[0].line for chunk_id in chunk_ids(redis_url)] == [5, 9]


def test_what_is_late_ends_where_somebody_looks_though_no_worker_lives(client: Client) -> None:
    late = SamplingParams(timeout=0.001)
    waited, asked = client.submit(["a", "b"], params=late), client.submit(["c"], params=late, name="asked")

    assert [result.failure.code for result in client.results(waited, timeout_s=30) if result.failure is not None] == [
        "deadline_exceeded"
    ] * 2
    while client.status(asked).job.state != "finished":
        pass
    assert client.wait(asked).num_error == 1


def test_after_an_outage_a_worker_has_the_time_to_bring_what_was_not_late(
    client: Client, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(client._watch, "_takeover", Takeover(30.0, lambda: now[0]))
    job = client.submit(["a", "b"], params=SamplingParams(timeout=0.001))
    lease = claim_next(ledger, [MODEL], "worker", 0.0)
    assert lease is not None

    def unavailable(work: object) -> None:
        raise DatabaseUnavailable("the database does not answer")

    with monkeypatch.context() as outage:
        outage.setattr(client._ledger, "read", unavailable)
        with pytest.raises(DatabaseUnavailable):
            client.status(job)
    now[0] = 60.0
    assert client.status(job).num_error == 0
    answer = Answer(text="in time", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
    commit(ledger, [ChunkCommit(lease, [Result(line=1, answer=answer)], is_finished=False)])
    now[0] = 90.0
    status = client.status(job)
    assert (status.num_ok, status.num_error) == (1, 1)


@pytest.mark.parametrize("url", ["carrier-pigeon://127.0.0.1", "redis://127.0.0.1:99999/0"])
def test_broker_that_no_bell_could_reach_is_refused_before_there_is_a_job(settings: Settings, url: str) -> None:
    with pytest.raises(ConfigurationError, match="broker_url"):
        Client(msgspec.structs.replace(settings, broker_url=url))


def test_errors_that_may_go_away_are_computed_again(
    client: Client, ledger: Ledger, redis_url: str, prompts: Callable[..., Path]
) -> None:
    path = prompts(plain("a"), "nonsense", plain("b"))
    job = client.submit(path)
    (first,) = chunk_ids(redis_url)
    lease = new_lease(ledger, first)
    failures = [
        Result(line=1, failure=Failure("engine_died", "it died")),
        Result(line=3, failure=Failure("empty_continuation", "nothing there")),
    ]
    commit(ledger, [ChunkCommit(lease, failures, is_finished=True)])
    assert client.wait(job).job.state == "finished"
    assert client.submit(path).state == "finished"
    assert client.has_retriable_errors(job)

    again = client.submit(path, retry_errors=True)

    assert (again.id, again.state) == (job.id, "running")
    assert chunk_ids(redis_url) == [first, first]
    assert lines_of(client.results(job, wait=False)) == [2, 3]
    lease = new_lease(ledger, first)
    answer = Answer(text="a!", finish_reason="stop", prompt_tokens=1, completion_tokens=2)
    commit(ledger, [ChunkCommit(lease, [Result(line=1, answer=answer)], is_finished=True)])
    status = client.wait(job)
    assert (status.num_ok, status.num_error) == (1, 2)
    assert not client.has_retriable_errors(job)
    assert client.retry(job) == 0


def test_empty_name_is_refused(client: Client) -> None:
    with pytest.raises(ConfigurationError, match="a Job's name is empty"):
        client.submit(["a"], name="")


def test_folder_as_input_is_refused(client: Client, tmp_path: Path) -> None:
    for name in (None, "nightly"):
        with pytest.raises(ConfigurationError, match="it is a folder, name a file in it"):
            client.submit(tmp_path, name=name)
    assert client.jobs() == []


def test_sqlite_with_a_broker_on_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the broker is on another machine"):
        Client(Settings(database_url=f"sqlite:///{tmp_path}/a.db", broker_url="redis://198.51.100.7/0"))


def test_database_without_tables_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="millrace migrate"):
        Client(Settings(database_url=f"sqlite:///{tmp_path}/a.db"))


def test_served_model_is_the_last_part_of_the_models_path(ledger: Ledger, database_url: str, redis_url: str) -> None:
    settings = Settings(
        database_url=database_url, broker_url=redis_url, engine=EngineSettings(model="models/millrace-tiny")
    )
    with Client(settings) as client:
        job: Job = client.submit(["a"])

    assert job.model == "millrace-tiny"
    assert len(messages(redis_url, "millrace-tiny")) == 1
