"""Interactive tasks as a foreign Celery app sees them, with one worker beside its broker.

Every prompt holds a marker. The last test looks for it, and for the answers, in all that the others left behind.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from celery import Celery, chain, chord, group
from celery.exceptions import NotRegistered, TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult
from sqlalchemy import func, select

from producer.client import Client
from protocol.celery_app import bulk_queue, interactive_queue
from protocol.sampling import SamplingParams
from protocol.settings import Settings
from storage.ledger import Ledger
from storage.tables import answers, jobs
from tests.e2e.conftest import PATIENCE_S, ROOT
from tests.e2e.foreign import LEASE_S, MARKER, TWIN, Beside, Watched, app, beside, generate, wait_until, watched

__all__ = ["app", "beside", "watched"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stops processes by signals")

#: As many tokens as the model holds: the better part of a second.
LONG = {"max_tokens": 400, "ignore_eos": True}


def get(result: AsyncResult) -> Any:
    return result.get(timeout=PATIENCE_S)


def count(database_url: str, table: Any) -> int:
    with closing(Ledger(database_url)) as ledger:
        return ledger.read(lambda connection: connection.scalar(select(func.count()).select_from(table))) or 0


def worker_stats(app: Celery) -> dict[str, Any]:
    replies: dict[str, Any] = wait_until(lambda: app.control.inspect(timeout=1).stats())
    (stats,) = replies.values()
    facts: dict[str, Any] = stats["pool"]
    return facts


def test_a_call_is_answered_and_its_answer_is_known_from_then_on(app: Celery, beside: Beside, watched: Watched) -> None:
    asked = {"max_tokens": 8, "temperature": 0}
    first = app.send_task("millrace.generate", args=[f"{MARKER} first"], kwargs=asked)
    answer = get(first)
    assert answer.keys() == {"text", "finish_reason", "usage", "cached"}
    assert (answer["finish_reason"], answer["usage"]["completion_tokens"], answer["cached"]) == ("length", 8, False)
    wait_until(lambda: count(beside.database_url, answers), "keeping the answer")
    assert count(beside.database_url, jobs) == 0

    again = app.send_task(
        "millrace.generate", kwargs={"prompt": f"{MARKER} first", **asked}, queue=interactive_queue("tiny")
    )
    assert get(again) == {**answer, "cached": True}
    wait_until(lambda: watched.types_of(again.id)[-1:] == ["task-succeeded"])
    assert watched.types_of(first.id) == ["task-received", "task-started", "task-succeeded"]
    received, succeeded = watched.of(first.id)[0], watched.of(first.id)[-1]
    assert (received["args"], received["kwargs"]) == ("(<17 characters>,)", "{max_tokens: 8, temperature: 0}")
    assert succeeded["result"] == f"1 answer, {answer['usage']['prompt_tokens']} tokens in, 8 out"
    assert watched.of(again.id)[-1]["result"].startswith("1 answer (known), ")


def test_a_worker_serves_a_second_name_it_was_told_of_and_no_third(app: Celery, beside: Beside) -> None:
    own = get(generate(app, "named").delay())
    queue = interactive_queue(TWIN)
    assert get(generate(app, "named", model=TWIN).apply_async(queue=queue))["text"] == own["text"]

    def settings(name: str) -> Settings:
        return Settings(broker_url=beside.redis_url, database_url=beside.database_url, model_name=name)

    with Client(settings("third")) as third, Client(settings(TWIN)) as twin:
        left = third.submit([f"{MARKER} left"])
        job = twin.submit(
            [{"prompt": f"{MARKER} named", "model": TWIN}], params=SamplingParams(temperature=0, max_tokens=8)
        )
        (result,) = twin.results(job, timeout_s=PATIENCE_S)
        assert result.answer is not None
        assert (result.answer.text, result.is_cached) == (own["text"], True)
        assert third.status(left).num_requests_waiting == 1
        third.cancel(left)
    stats = worker_stats(app)
    assert (stats["model"], stats["also_serves"]) == ("tiny", TWIN)


def test_runtime_is_that_of_the_engine(app: Celery, watched: Watched) -> None:
    started = time.monotonic()
    result = generate(app, "long", temperature=1, **LONG).delay()
    get(result)
    took_s = time.monotonic() - started
    wait_until(lambda: "task-succeeded" in watched.types_of(result.id))
    assert took_s / 2 < watched.of(result.id)[-1]["runtime"] <= took_s


def test_chains_groups_and_chords_go_on_with_the_text(app: Celery) -> None:
    one, two = (get(generate(app, word).delay())["text"] for word in ("one", "two"))
    direct = get(generate(app, f"so far: {one}").delay())["text"]

    chained = chain(generate(app, "one"), generate(app, prompt=f"{MARKER} so far: {{text}}"))
    assert get(chained())["text"] == direct
    assert [reply["text"] for reply in get(group(generate(app, "one"), generate(app, "two"))())] == [one, two]
    joined = get(chord([generate(app, "one"), generate(app, "two")])(generate(app)))
    assert (
        joined["text"]
        == get(app.send_task("millrace.generate", [f"{one}\n\n{two}"], {"max_tokens": 8, "temperature": 0}))["text"]
    )
    messages = [{"role": "user", "content": f"{MARKER}: {{text}}"}]
    chat = get(chain(generate(app, "one"), generate(app, messages=messages))())
    messages = [{"role": "user", "content": f"{MARKER}: {one}"}]
    assert chat["text"] == get(generate(app, messages=messages).delay())["text"]


def test_the_example_of_another_project_runs(beside: Beside) -> None:
    command = [sys.executable, str(ROOT / "examples/celery_chain.py"), beside.redis_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, cwd=beside.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "24 tokens, length"


def test_samples_and_log_probabilities_come_with_the_answer(app: Celery) -> None:
    reply = get(generate(app, "several", temperature=1, seed=7, n=3, logprobs=1).delay())
    assert len({sample["text"] for sample in reply["samples"]}) == 3
    assert reply["text"] == reply["samples"][0]["text"]
    assert len(reply["logprobs"]["content"]) == 8


def test_a_text_is_scored(app: Celery) -> None:
    kwargs = {"context": f"{MARKER} the queue", "continuation": " holds the prompts"}
    reply = get(app.send_task("millrace.score", kwargs=kwargs))
    assert "".join(token["token"] for token in reply["score"]["tokens"]) == " holds the prompts"
    assert reply["score"]["logprob"] < 0
    with pytest.raises(ValueError, match=r"300018 characters, which are .* this engine holds 512 of prompt"):
        get(app.send_task("millrace.score", kwargs={**kwargs, "context": "a longer context " * 17_647 + " "}))
    whole = get(app.send_task("millrace.score", [f"{MARKER} the queue holds"]))
    assert whole["score"]["num_tokens"] > reply["score"]["num_tokens"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "missing_field: prompt or messages is missing"),
        ({"prompt": MARKER, "max_tokens": -1}, "invalid_parameter: max_tokens=-1 is out of range: it must be between"),
        ({"prompt": MARKER, "max_token": 1}, "unknown_field: 'max_token' is not a known field"),
        ({"prompt": MARKER, "self": 1}, "unknown_field: 'self' is not a known field"),
        ({"prompt": MARKER, "stop": ["", MARKER]}, "invalid_parameter: stop=.* is out of range"),
        ({"prompt": f"{MARKER} " * 400}, "prompt_too_long: the prompt has .* tokens.*; this engine holds 512"),
        (
            {"prompt": f"{MARKER} " * 100_000},
            r"the prompt has 1200000 characters, which are \d+ tokens or more; this engine holds 512",
        ),
        ({"prompt": {MARKER: MARKER}}, "invalid_type: prompt must be a string or token ids"),
        ({"prompt": MARKER, "model": MARKER}, "unknown_model: .* this worker's, which is 'tiny'"),
        ({"messages": [{"role": MARKER}]}, "missing_field: messages.0. needs content"),
        ({"messages": [{MARKER: MARKER}]}, "messages.0. has a field beside role and content, which is not supported"),
    ],
)
def test_a_callers_mistake_is_raised_with_what_is_wrong(app: Celery, kwargs: dict[str, Any], message: str) -> None:
    result = app.send_task("millrace.generate", kwargs=kwargs)
    with pytest.raises(ValueError, match=message) as raised:
        get(result)
    assert type(raised.value) is ValueError
    assert MARKER not in f"{raised.value} {result.traceback}"


def test_what_this_model_is_not_served_for_is_refused_on_its_own_queue(app: Celery) -> None:
    asked = app.send_task("millrace.embed", [MARKER], queue=interactive_queue("tiny"))
    with pytest.raises(ValueError, match="unsupported_kind: the model 'tiny' is not served for embed"):
        get(asked)
    with pytest.raises(NotRegistered):
        get(app.send_task("millrace.generated", [MARKER]))


def test_an_expired_call_is_not_computed(app: Celery, watched: Watched) -> None:
    result = generate(app, "too late").apply_async(expires=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(TaskRevokedError):
        get(result)
    assert "task-started" not in watched.types_of(result.id)


def test_a_call_that_expires_in_the_engine_ends_and_frees_its_blocks(
    app: Celery, beside: Beside, watched: Watched
) -> None:
    never = datetime(9999, 12, 31, tzinfo=UTC)
    assert get(generate(app, "never expires").apply_async(expires=never))["usage"]["completion_tokens"] == 8
    (engine,) = beside.engines()
    # It does not get on, so that none of them can end in time.
    os.kill(engine, signal.SIGSTOP)
    try:
        results = [generate(app, f"expires {i}", temperature=1, n=8, **LONG).apply_async(expires=2) for i in range(4)]
        for result in results:
            with pytest.raises(TaskRevokedError, match="expired"):
                get(result)
        wait_until(lambda: watched.types_of(results[-1].id)[-1:] == ["task-revoked"])
        assert watched.of(results[-1].id)[-1]["expired"] is True
        assert "task-started" in watched.types_of(results[-1].id)
        stats = worker_stats(app)
        assert (stats["running"], stats["open_calls"]) == (0, 0)
    finally:
        os.kill(engine, signal.SIGCONT)
    get(generate(app, "after those that expired").delay())
    wait_until(lambda: worker_stats(app)["kv_tokens_used"] == 0, "freeing the blocks")
    # In time is in time.
    assert get(generate(app, "in time").apply_async(expires=PATIENCE_S))["usage"]["completion_tokens"] == 8


def test_a_countdown_is_waited_for_and_can_be_revoked(app: Celery, watched: Watched) -> None:
    # Longer than the broker's patience with messages that nobody acks.
    later, never = (generate(app, word).apply_async(countdown=LEASE_S + 1) for word in ("later", "never"))
    scheduled = wait_until(lambda: next(iter((app.control.inspect(timeout=1).scheduled() or {}).values()), None))
    assert {task["request"]["id"] for task in scheduled} == {later.id, never.id}
    assert MARKER not in str(scheduled)
    sent = time.monotonic()
    never.revoke()
    assert get(later)["usage"]["completion_tokens"] == 8
    assert time.monotonic() - sent > LEASE_S - 1
    with pytest.raises(TaskRevokedError):
        get(never)
    # Nobody has handed them out a second time.
    assert watched.types_of(later.id).count("task-received") == 1


@pytest.mark.parametrize("terminate", [True, False])
def test_revoking_a_running_call_frees_its_sequence(app: Celery, watched: Watched, terminate: bool) -> None:
    results = [generate(app, f"revoked {i}", temperature=1, n=16, **LONG).delay() for i in range(8)]
    wait_until(lambda: "task-started" in watched.types_of(results[-1].id))
    active = next(iter(app.control.inspect(timeout=1).active().values()))
    assert MARKER not in str(active)
    app.control.revoke([result.id for result in results], terminate=terminate)
    for result in results[2:]:
        with pytest.raises(TaskRevokedError):
            get(result)
    wait_until(lambda: worker_stats(app)["running"] == 0, "freeing the engine")
    assert worker_stats(app)["open_calls"] == 0


def test_a_time_limit_is_kept(app: Celery) -> None:
    results = [generate(app, "limited", temperature=1, n=16, **LONG).apply_async(time_limit=0.2) for _ in range(8)]
    with pytest.raises(TimeLimitExceeded):
        get(results[-1])


def test_calls_do_not_wait_behind_bulk(app: Celery, beside: Beside) -> None:
    settings = Settings(broker_url=beside.redis_url, database_url=beside.database_url, model_name="tiny")
    params = SamplingParams(temperature=1.0, max_tokens=200, ignore_eos=True)
    with Client(settings) as client:
        job = client.submit([f"{MARKER} {i}" for i in range(2000)], params=params)
        wait_until(lambda: client.status(job).num_ok > 0)
        for i in range(5):
            get(generate(app, f"urgent {i}").delay())
        status = client.status(job)
        assert status.num_ok < 1000
        client.cancel(job)
    wait_until(lambda: worker_stats(app)["running"] == 0)


def test_a_worker_that_dies_leaves_its_calls_to_another(app: Celery, beside: Beside) -> None:
    second = beside.start_worker("second")
    results = [generate(app, f"orphan {i}", temperature=1, n=4, **LONG).delay() for i in range(6)]
    wait_until(lambda: len(app.control.inspect(timeout=1).active() or {}) == 2)
    second.kill()
    second.wait()
    assert [len(get(result)["samples"]) for result in results] == [4] * 6


def test_a_call_that_is_delivered_again_is_answered_once(app: Celery, beside: Beside, watched: Watched) -> None:
    second = beside.start_worker("stopped")
    results = [generate(app, f"twice {i}", temperature=1, n=4, **LONG).delay() for i in range(6)]
    wait_until(lambda: len(app.control.inspect(timeout=1).active() or {}) == 2)
    second.send_signal(signal.SIGSTOP)
    try:
        assert [len(get(result)["samples"]) for result in results] == [4] * 6
    finally:
        second.send_signal(signal.SIGCONT)
    second.terminate()
    assert second.wait(PATIENCE_S) == 0


def test_a_stopping_worker_gives_its_calls_back_at_once(app: Celery, beside: Beside) -> None:
    second = beside.start_worker("ended")
    results = [generate(app, f"given back {i}", temperature=1, n=4, **LONG).delay() for i in range(6)]
    wait_until(lambda: len(app.control.inspect(timeout=1).active() or {}) == 2)
    second.terminate()
    assert second.wait(PATIENCE_S) == 0
    assert [len(get(result)["samples"]) for result in results] == [4] * 6


def test_other_apps_tasks_on_the_shared_queue_are_left_to_them(app: Celery, beside: Beside) -> None:
    own_queue = interactive_queue("tiny")
    waiting = app.send_task("foreign.shout", ["whisper"])
    spoken = chain(generate(app, "spoken").set(queue=own_queue), app.signature("foreign.shout"))()
    quiet = get(generate(app, "spoken").apply_async(queue=own_queue))["text"]
    beside.start_foreign_worker(
        f"""
from celery import Celery
app = Celery("theirs", broker="{beside.redis_url}", backend="{beside.redis_url}")
@app.task(name="foreign.shout")
def shout(said):
    return (said if isinstance(said, str) else said["text"]).upper()
"""
    )
    try:
        assert get(waiting) == "WHISPER"
        assert get(spoken) == quiet.upper()
    finally:
        beside.stop_last()


@pytest.mark.parametrize("serializer", ["pickle", "yaml"])
def test_messages_that_are_not_accepted_are_refused(app: Celery, serializer: str) -> None:
    result = app.send_task("millrace.generate", [MARKER], serializer=serializer)
    with pytest.raises(ValueError, match=r"unreadable_message: .*it must be json and msgpack"):
        get(result)


def test_bodies_that_make_no_sense_are_refused(app: Celery, beside: Beside) -> None:
    with app.connection() as connection, connection.Producer() as producer:
        for i, body in enumerate(
            (
                f'["{MARKER}"',
                f'"{MARKER}"',
                "[]",
                f'[{{"{MARKER}": 1}}, "{MARKER}", {{}}]',
                "[[], {}]",
                f'[["{MARKER}"], {{}}, "{MARKER}"]',
            )
        ):
            producer.publish(
                body,
                routing_key="celery",
                content_type="application/json",
                content_encoding="utf-8",
                headers={"task": "millrace.generate", "id": f"senseless-{i}"},
            )
            with pytest.raises(ValueError, match=r"unreadable_message|invalid_type|missing_field"):
                get(AsyncResult(f"senseless-{i}", app=app))
        # No task at all, of either protocol.
        producer.publish({"nonsense": MARKER}, routing_key="celery", serializer="json")
        producer.publish(MARKER, routing_key="celery", content_type="text/plain", content_encoding="utf-8")
    # Nor a message, of kombu or anybody.
    with redis.Redis.from_url(beside.redis_url) as client:
        for queue in ("celery", interactive_queue("tiny"), bulk_queue("tiny")):
            for nonsense in (
                MARKER,
                b"\xff\xfe",
                "[]",
                f'{{"body": "{MARKER}", "properties": {{"body_encoding": "base64"}}}}',
            ):
                client.lpush(queue, nonsense)
    old = Celery("old", broker=app.conf.broker_url, backend=app.conf.result_backend, set_as_current=False)
    with old:
        old.conf.task_protocol = 1
        assert get(generate(old, "of the old protocol").delay())["usage"]["completion_tokens"] == 8
    get(generate(app, "still there").delay())


def test_neither_prompts_nor_answers_are_seen_by_anybody_else(app: Celery, beside: Beside, watched: Watched) -> None:
    text = get(generate(app, "secret").delay())["text"]
    result = generate(app, "secret", max_tokens=-1).delay()
    with pytest.raises(ValueError, match="max_tokens"):
        get(result)
    wait_until(lambda: "task-failed" in watched.types_of(result.id))
    seen = str(watched.events)
    assert len(watched.events) > 5
    for path in {*beside.folder.glob("*.log")} - {beside.log("theirs")}:
        seen += path.read_text()
    assert "DEBUG" in seen
    assert MARKER not in seen
    assert repr(text)[1:-1] not in seen
