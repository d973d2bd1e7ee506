"""Pairs split as lm-evaluation-harness splits them, and the engine's pieces put together."""

from pathlib import Path

import numpy as np
import pytest

from protocol.frames import TokenScores
from protocol.requests import Failure, Request
from protocol.scores import unpack_score
from worker.scoring import ScoredPrompt, ScoreParts, encode_scored
from worker.text import Tokenizer


def words(text: str) -> list[int]:
    """Each word with the blank before it is a token, as in byte-level vocabularies; its id is its length."""
    tokens, word = [], ""
    for character in text:
        if character == " " and word.strip():
            tokens.append(len(word))
            word = ""
        word += character
    return [*tokens, len(word)] if word else tokens


def pair(context: str, continuation: str) -> ScoredPrompt | Failure:
    return encode_scored(Request(line=1, kind="score", context=context, continuation=continuation), words, 77)


def test_pair_is_encoded_together_and_split_behind_the_context() -> None:
    assert pair("one two", " three") == ScoredPrompt([3, 4, 6], 2)


def test_blanks_that_end_the_context_belong_to_the_continuation() -> None:
    assert pair("one two ", "three") == pair("one two", " three")


def test_continuation_that_merges_with_the_context_is_what_lies_behind_it() -> None:
    assert pair("one tw", "o three") == ScoredPrompt([3, 4, 6], 2)


def test_without_a_context_the_first_token_of_texts_is_the_context() -> None:
    assert pair("", "one two") == ScoredPrompt([77, 3, 4], 1)
    assert pair("  ", "one") == ScoredPrompt([77, 5], 1)


def test_prefix_that_the_tokenizer_adds_itself_stands_there_once() -> None:
    request = Request(line=1, kind="score", prompt="one two")
    assert encode_scored(request, lambda text: [77, *words(text)], 77) == ScoredPrompt([77, 3, 4], 1)


def test_text_is_scored_from_its_first_token_on() -> None:
    assert encode_scored(Request(line=1, kind="score", prompt="one two"), words, 77) == ScoredPrompt([77, 3, 4], 1)


@pytest.mark.parametrize("request_", [Request(line=1, kind="score", prompt=""), Request(line=1, continuation="")])
def test_nothing_to_score_is_a_failure(request_: Request) -> None:
    failure = encode_scored(request_, words, 77)
    assert isinstance(failure, Failure)
    assert failure.code == "empty_continuation"


def test_split_of_a_real_tokenizer_gives_back_the_text(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer(tokenizer_folder)
    request = Request(line=1, kind="score", context="the queue ", continuation="holds prompts")

    found = encode_scored(request, tokenizer.encode_text, tokenizer.prefix_token_id)

    assert isinstance(found, ScoredPrompt)
    assert tokenizer.decode_alone(found.token_ids[: found.start]) == "the queue"
    assert tokenizer.decode_alone(found.token_ids[found.start :]) == " holds prompts"


def part(start: int, logprobs: list[float], ranks: list[int]) -> TokenScores:
    top_ids = np.arange(2 * len(ranks), dtype="<i4").tobytes()
    top = np.full(2 * len(ranks), -0.5, dtype="<f4").tobytes()
    packed = np.array(logprobs, dtype="<f4").tobytes(), np.array(ranks, dtype="<i4").tobytes()
    return TokenScores(1, start, *packed, num_top=2, top_ids=top_ids, top_logprobs=top)


def test_pieces_become_one_score() -> None:
    parts = ScoreParts(2, [part(2, [-0.5, -1.0], [1, 3]), part(4, [-0.25], [1])])

    score = unpack_score(parts.pack([9, 8, 7, 6, 5], lambda token: f"<{token}>".encode()))

    assert (score.logprob, score.num_tokens, score.is_greedy) == (-1.75, 3, False)
    assert score.perplexity == pytest.approx(np.exp(1.75 / 3))
    assert [(t.token, t.token_id, t.logprob, t.rank) for t in score.tokens] == [
        ("<7>", 7, -0.5, 1),
        ("<6>", 6, -1.0, 3),
        ("<5>", 5, -0.25, 1),
    ]
    assert [a.token_id for a in score.tokens[1].top_logprobs] == [2, 3]


def test_score_is_greedy_when_every_token_ranks_first() -> None:
    parts = ScoreParts(1, [part(1, [-0.5, -float("inf")], [1, 1])])

    score = unpack_score(parts.pack([9, 8, 7], lambda token: b"x"))

    assert score.is_greedy
    assert score.tokens[1].logprob == -9999.0
