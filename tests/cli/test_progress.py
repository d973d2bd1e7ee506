import logging

import pytest
from msgspec.structs import replace

from cli.progress import Progress, clock_time
from protocol.sampling import SamplingParams
from storage.jobs import Job, JobState, JobStatus


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def status(num_ok: int, computed_tokens: int, *, state: JobState = "running", n: int | None = None) -> JobStatus:
    job = Job("0" * 16, "default", "i", "tiny", SamplingParams(n=n), state, 0.0, 1000)
    return JobStatus(
        job=job,
        num_lines=1000,
        num_ok=num_ok,
        num_error=2,
        num_cached=10,
        num_chunks=4,
        num_chunks_finished=1,
        num_requests=998,
        num_requests_waiting=0,
        num_requests_leased=0,
        prompt_tokens=0,
        completion_tokens=0,
        computed_tokens=computed_tokens,
    )


def show(clock: Clock, *statuses: tuple[float, JobStatus]) -> None:
    with Progress(clock) as progress:
        for seconds, each in statuses:
            clock.now = 100 + seconds
            progress.show_status(each)


def test_lines_are_printed_every_few_seconds_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show(Clock(), (0, status(0, 0)), (2, status(98, 500)), (5, status(198, 1500)), (6, status(218, 1700)))

    out, err = capsys.readouterr()
    assert out == ""
    assert err == "200/1,000 results, 300 tokens/s, 10 known, 2 errors, 0:20 left\n"


def test_line_is_rewritten_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)

    show(Clock(), (0, status(0, 0)), (1, status(98, 500)))

    assert capsys.readouterr().err == (
        "\r\x1b[K2/1,000 results, waiting for a worker, 10 known, 2 errors"
        "\r\x1b[K100/1,000 results, 500 tokens/s, 10 known, 2 errors, 0:09 left"
        "\r\x1b[K"
    )


@pytest.mark.parametrize(
    ("is_loading", "num_leased", "text"),
    [
        (True, 0, "the model is being loaded"),
        (False, 0, "the worker is ready"),
        (True, 7, "running"),
        (False, 7, "running"),
        (None, 0, "waiting for a worker"),
        (None, 7, "running"),
    ],
)
def test_no_result_yet_is_not_taken_for_a_model_that_is_being_loaded(
    capsys: pytest.CaptureFixture[str], is_loading: bool | None, num_leased: int, text: str
) -> None:
    clock = Clock()
    with Progress(clock) as progress:
        clock.now += 5
        progress.show_status(replace(status(0, 0), num_requests_leased=num_leased), is_loading=is_loading)

    assert capsys.readouterr().err == f"2/1,000 results, {text}, 10 known, 2 errors\n"


def test_speed_is_that_of_the_last_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    show(Clock(), (0, status(0, 0)), (90, status(100, 1000)), (95, status(100, 1000)), (110, status(200, 4000)))

    assert capsys.readouterr().err.splitlines()[-1].startswith("202/1,000 results, 200 tokens/s")


def test_samples_count_as_results_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    show(Clock(), (0, status(0, 0, n=2)), (5, status(998, 10, n=2)))

    assert capsys.readouterr().err.startswith("1,000/2,000 results")


def test_job_that_is_being_submitted_has_no_end_in_sight(capsys: pytest.CaptureFixture[str]) -> None:
    show(Clock(), (0, status(0, 0, state="submitting")), (5, status(98, 10, state="submitting")))

    assert capsys.readouterr().err == "100/1,000+ results, 2 tokens/s, 10 known, 2 errors\n"


def test_warnings_of_ours_are_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(Clock()):
        logging.getLogger("millrace.local").warning("the worker died")
        logging.getLogger("millrace.local").info("not this")
    logging.getLogger("millrace.local").info("nor this")

    assert capsys.readouterr().err == "warning: the worker died\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3599.6, "1:00:00"), (3661, "1:01:01")])
def test_time_is_shown_as_on_a_clock(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text
