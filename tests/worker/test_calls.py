"""Calls without a queue: their arguments read, one open at a time for each task, replies that show counts alone."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from protocol.errors import InvalidRequest
from protocol.requests import Answer, Failure, Kind, Message, Request, Result
from worker.call_reading import read_call
from worker.call_service import CallService
from worker.inference import Inference
from worker.open_call import OpenCall
from worker.quiet_request import shown_args, shown_kwargs
from worker.reply import Reply, error_of

EARLIER = {"text": "so far", "usage": {}}


@dataclass
class FakeTicket:
    task_id: str
    priority: int = 0
    expires_in_s: float | None = None
    kind: Kind = "generate"
    args: tuple[Any, ...] = ("the queue",)
    kwargs: dict[str, Any] = field(default_factory=dict)
    outcome: Reply | Exception | None = None
    is_discarded: bool = False

    def complete(self, outcome: Reply | Exception) -> None:
        assert self.outcome is None
        self.outcome = outcome

    def discard(self) -> None:
        self.is_discarded = True


class FakeInference:
    """Runs `act` for whoever asks for something; `abandoned` are those that were given up."""

    def __init__(self, act: Callable[[OpenCall, Request], None]) -> None:
        self._act = act
        self.preparation = self
        self.abandoned: list[OpenCall] = []

    def run(self, owner: OpenCall, requests: Iterable[Request]) -> None:
        for request in requests:
            self._act(owner, request)

    def abandon(self, owner: OpenCall) -> None:
        self.abandoned.append(owner)


def answer(text: str = "holds") -> Answer:
    return Answer(text=text, finish_reason="stop", prompt_tokens=2, completion_tokens=3)


def settle(call: OpenCall, _: Request) -> None:
    call.expect(1)
    call.settle(Result(line=1, answer=answer()), b"key")


def served(inference: FakeInference, *tickets: FakeTicket) -> list[tuple[bytes, Answer]]:
    """Everything that was kept, when all of these have been taken up."""
    kept: list[tuple[bytes, Answer]] = []
    service = CallService(
        cast("Inference", inference), ["tiny"], "default", keep=lambda *pair: kept.append(pair), on_fatal=pytest.fail
    )
    for ticket in tickets:
        service.receive(ticket)
    service.start()
    service.close()
    return kept


def test_a_message_that_is_delivered_again_joins_the_call_that_is_open() -> None:
    first, again, other = FakeTicket("a"), FakeTicket("a"), FakeTicket("b")
    kept = served(FakeInference(settle), first, again, other)
    # The newest is the one whose channel is alive; the task's callbacks must not run twice.
    assert (first.outcome, first.is_discarded) == (None, True)
    assert isinstance(again.outcome, Reply)
    assert isinstance(other.outcome, Reply)
    assert kept == [(b"key", answer())] * 2


def test_a_cancelled_call_is_given_up_and_its_answer_comes_to_nobody() -> None:
    ticket = FakeTicket("a")

    def cancel(call: OpenCall, request: Request) -> None:
        service.cancel("a")
        settle(call, request)

    inference = FakeInference(cancel)
    kept: list[tuple[bytes, Answer]] = []
    service = CallService(
        cast("Inference", inference), ["tiny"], "default", keep=lambda *pair: kept.append(pair), on_fatal=pytest.fail
    )
    service.receive(ticket)
    service.start()
    service.close()
    assert (ticket.outcome, ticket.is_discarded, len(inference.abandoned)) == (None, True, 1)
    assert kept == [(b"key", answer())]
    assert service.num_open == 0


def test_a_call_nested_deeper_than_functions_may_be_is_refused() -> None:
    nested: object = "deep"
    for _ in range(2000):
        nested = [nested]
    ticket = FakeTicket("nested", args=(nested,))
    served(FakeInference(settle), ticket)
    assert isinstance(ticket.outcome, ValueError)
    assert str(ticket.outcome).startswith("invalid_type: ")


def test_no_call_waits_for_a_large_one_nor_does_who_stops_for_more_than_one() -> None:
    large, left = (
        FakeTicket(name, args=(), kwargs={"messages": [{"role": "user", "content": "x" * 100_000}]})
        for name in ("large", "left")
    )
    small = FakeTicket("small")
    is_large_in_hand, is_closing = threading.Event(), threading.Event()

    def act(call: OpenCall, request: Request) -> None:
        if call.task_id == "large":
            is_large_in_hand.set()
            assert is_closing.wait(30)
        settle(call, request)

    service = CallService(
        cast("Inference", FakeInference(act)), ["tiny"], "default", keep=lambda *_: None, on_fatal=pytest.fail
    )
    for ticket in (large, left, small):
        service.receive(ticket)
    service.start()
    assert is_large_in_hand.wait(30)
    closing = threading.Thread(target=service.close)
    closing.start()
    service._threads[0].join(30)  # the small ones' has been told to end
    is_closing.set()
    closing.join()

    assert isinstance(small.outcome, Reply)
    assert isinstance(large.outcome, Reply)
    # It is not acked, so that another worker gets it, and nobody waits for its end here.
    assert (left.outcome, left.is_discarded, service.num_open) == (None, False, 0)


def test_a_fault_of_ours_is_told_by_its_type_alone() -> None:
    def fail(_: OpenCall, request: Request) -> None:
        raise KeyError(request.prompt)

    ticket = FakeTicket("a")
    served(FakeInference(fail), ticket)
    assert isinstance(ticket.outcome, RuntimeError)
    assert str(ticket.outcome).startswith("internal_error: the worker failed at this: KeyError in ")
    assert "the queue" not in str(ticket.outcome)


def test_half_a_character_is_the_callers_mistake() -> None:
    def encode(_: OpenCall, request: Request) -> None:
        (request.prompt or "").encode()

    ticket = FakeTicket("a", args=("a\ud800",))
    served(FakeInference(encode), ticket)
    assert isinstance(ticket.outcome, ValueError)
    assert str(ticket.outcome) == "invalid_utf8: a text has half of a surrogate pair: leave it out"


def test_calls_are_more_urgent_than_any_job_and_among_themselves_as_redis_serves_them() -> None:
    calls = [
        OpenCall(FakeTicket("a", priority), "default", keep=lambda *_: None, on_end=lambda *_: None)
        for priority in (0, 9)
    ]
    assert calls[0].priority < calls[1].priority < -1000


def test_content_comes_by_position_by_keyword_or_from_the_task_before() -> None:
    def read(kind: Kind, *args: Any, **kwargs: Any) -> Request:
        return read_call(kind, args, kwargs, ["tiny"])

    assert read("generate", "a").prompt == read("generate", prompt="a").prompt == "a"
    assert read("generate", [1, 2]).prompt_token_ids == (1, 2)
    assert read("generate", [{"role": "user", "content": "a"}]).messages == (Message("user", "a"),)
    assert read("generate", EARLIER).prompt == "so far"
    assert read("generate", [EARLIER, EARLIER]).prompt == "so far\n\nso far"
    assert read("generate", EARLIER, prompt="say: {text}!", model="tiny").prompt == "say: so far!"
    assert read("score", EARLIER, context="first").continuation == "so far"
    assert read("score", "a").prompt == "a"
    assert read("embed", [EARLIER, EARLIER]).inputs == ("so far", "so far")
    assert read("classify", "a").kind == "classify"


@pytest.mark.parametrize(
    ("args", "kwargs", "code"),
    [
        (("a", "b"), {}, "invalid_type"),
        (("a",), {"prompt": "b"}, "invalid_parameter"),
        (({"text": None, "usage": {}, "score": {}},), {}, "invalid_type"),
        ((EARLIER,), {"prompt": "no place for it"}, "invalid_parameter"),
        (("a",), {"self": "b"}, "unknown_field"),
        (("a",), {"kind": "score"}, "invalid_parameter"),
        (("a",), {"model": "other"}, "unknown_model"),
        (("a",), {"max_tokens": "many"}, "invalid_type"),
    ],
)
def test_what_is_no_request_is_refused(args: tuple[Any, ...], kwargs: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_call("generate", args, kwargs, ["tiny"])
    assert refused.value.code == code


def test_an_embedding_is_nothing_to_go_on_with_and_the_error_says_so() -> None:
    """An embedding's text is empty: the caller was told that the prompt he never wrote was."""
    with pytest.raises(InvalidRequest) as refused:
        read_call("generate", ({"text": "", "usage": {}, "embedding": [0.5]},), {}, ["tiny"])
    assert refused.value.message == (
        "the task before this one returned no text (its embedding has none): millrace.generate goes on with what "
        "millrace.generate or millrace.classify returned"
    )


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("embed", {"dimensions": "secret"}),
        ("embed", {"encoding_format": ["my secret"]}),
        ("generate", {"my secret": 1}),
        ("generate", {"messages": [{"role": "user", "content": "a", "secret": 1}]}),
        ("generate", {"messages": [{"role": "user", "content": [{"type": {"secret": 1}}]}]}),
    ],
)
def test_a_refusal_quotes_no_words_of_the_caller(kind: Kind, kwargs: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_call(kind, () if "messages" in kwargs else ("a",), kwargs, ["tiny"])
    assert "secret" not in refused.value.message


def test_replies_are_counts_to_all_but_the_caller() -> None:
    reply = Reply([Result(line=1, sample=i, answer=answer(f"text {i}")) for i in range(2)])
    assert repr(reply) == "2 answers, 2 tokens in, 6 out"
    shown = reply.__json__()
    assert [sample["text"] for sample in shown["samples"]] == [shown["text"], "text 1"] == ["text 0", "text 1"]
    assert type(error_of(Failure("invalid_type", "no"))) is ValueError
    assert type(error_of(Failure("engine_died", "no"))) is RuntimeError


def test_arguments_are_shown_as_counts() -> None:
    assert shown_args(("four", 17, [1, 2])) == "(<4 characters>, 17, <2 entries>)"
    assert shown_kwargs({"prompt": "four", "top_p": 0.5, "words of mine": None}) == (
        "{prompt: <4 characters>, top_p: 0.5, <unknown>: None}"
    )
