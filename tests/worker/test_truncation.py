"""What is left of prompts that are too long, and whose answer that is."""

from protocol.requests import Request, answer_key
from protocol.sampling import SamplingParams, resolve
from worker.truncation import keep_end, of_token_ids

LONG = list(range(10, 30))


def test_the_end_stays_and_leaves_room_for_the_answer() -> None:
    assert keep_end(LONG, 4, 16, None) == LONG[-12:]
    assert keep_end(LONG, 15, 16, 10) == LONG[-1:]


def test_the_token_that_begins_texts_stays_in_front() -> None:
    assert keep_end(LONG, 4, 16, first_token_id=10) == [10, *LONG[-11:]]
    assert keep_end(LONG, 4, 16, first_token_id=11) == LONG[-12:]


def test_what_fits_is_left_alone() -> None:
    assert keep_end(LONG, 4, 24, None) is LONG


def test_an_open_ended_answer_cuts_only_what_leaves_no_room_and_then_to_half() -> None:
    assert keep_end(LONG, 21, 21, None) is LONG
    assert keep_end(LONG, 20, 20, None) == LONG[-10:]


def test_what_was_cut_has_the_key_of_the_tokens_that_are_left_and_no_other() -> None:
    params = resolve(SamplingParams(temperature=0, too_long="truncate-left"), max_tokens=4)
    plain = resolve(SamplingParams(temperature=0), max_tokens=4)
    request = Request(line=1, prompt="a long text", custom_id="x")

    cut = of_token_ids(request, [5, 6])

    assert (cut.line, cut.custom_id, cut.prompt) == (1, "x", None)
    ending = Request(line=2, prompt_token_ids=(5, 6))
    assert answer_key("t", "m", cut, params, 0) == answer_key("t", "m", ending, plain, 0)
    # As long as nothing is cut, it does not matter what would be.
    assert answer_key("t", "m", request, params, 0) == answer_key("t", "m", request, plain, 0)
