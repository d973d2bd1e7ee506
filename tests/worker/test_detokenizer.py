"""Text from tokens, piece by piece and whole, on the bundled tokenizer and on one with byte fallback."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.requests import Message, Request
from worker.text import StopWatch, Tokenizer

BUNDLED = Path(__file__).parents[2] / "models" / "millrace-tiny"
#: Ids of the bundled tokenizer, and some beyond it, as a model with a padded vocabulary may draw them.
BUNDLED_IDS = st.lists(st.integers(0, 3075), max_size=40)


@cache
def bundled() -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    return Tokenizer(BUNDLED), AutoTokenizer.from_pretrained(str(BUNDLED), local_files_only=True)


def pieces(tokenizer: Tokenizer, prompt: Sequence[int], outputs: Sequence[int]) -> list[str]:
    """What each token settles, and how the rest reads at the end."""
    detokenizer, found = tokenizer.detokenizer(prompt), []
    for token in outputs:
        before = detokenizer.settled
        detokenizer.push(token)
        assert detokenizer.settled.startswith(before)
        found.append(detokenizer.settled[len(before) :])
    return [*found, detokenizer.pending]


@settings(max_examples=500, deadline=None)
@given(prompt=BUNDLED_IDS, outputs=BUNDLED_IDS)
def test_pieces_of_any_tokens_make_up_the_decode_of_all_of_them(prompt: list[int], outputs: list[int]) -> None:
    tokenizer, transformers = bundled()

    text = transformers.decode(outputs, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    assert "".join(pieces(tokenizer, prompt, outputs)) == text
    assert tokenizer.decode(prompt, outputs) == text


@settings(max_examples=300, deadline=None)
@given(outputs=BUNDLED_IDS)
def test_bytes_of_tokens_make_up_the_text_of_all_of_them(outputs: list[int]) -> None:
    tokenizer, _ = bundled()
    shown = [token for token in outputs if token > 3]  # the first four are special

    assert b"".join(map(tokenizer.token_bytes, shown)).decode(errors="replace") == tokenizer.decode([], outputs)


@pytest.fixture(scope="module")
def fallback(byte_fallback_folder: Path) -> Tokenizer:
    return Tokenizer(byte_fallback_folder)


def byte_ids(data: bytes) -> list[int]:
    return [3 + byte for byte in data]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    (ids,) = tokenizer.encode([Request(line=1, prompt=text)])
    assert isinstance(ids, list)
    return ids


@settings(max_examples=500, deadline=None)
@given(outputs=st.lists(st.integers(0, 282), max_size=30), data=st.data())
def test_pieces_with_byte_fallback_make_up_the_decode_of_all_of_them(outputs: list[int], data: st.DataObject) -> None:
    tokenizer = test_pieces_with_byte_fallback_make_up_the_decode_of_all_of_them.tokenizer  # type: ignore[attr-defined]
    prompt = encode(tokenizer, "hello a") + data.draw(st.lists(st.integers(0, 282), max_size=8))

    parts = pieces(tokenizer, prompt, outputs)

    assert "".join(parts) == tokenizer.decode(prompt, outputs)
    # After a word, what transformers makes of both together less what it makes of the word; nothing is lost or added.
    word = encode(tokenizer, "hello")
    both = tokenizer.decode_alone([*word, *outputs])
    assert "".join(pieces(tokenizer, word, outputs)) == both.removeprefix("hello")


@pytest.fixture(scope="module", autouse=True)
def _share_tokenizer(fallback: Tokenizer) -> None:
    # hypothesis runs one function many times, so it takes the tokenizer from here and not as a fixture.
    function: Any = test_pieces_with_byte_fallback_make_up_the_decode_of_all_of_them
    function.tokenizer = fallback


def test_byte_fallback_gives_whole_characters_and_keeps_leading_spaces(fallback: Tokenizer) -> None:
    prompt = encode(fallback, "hello")
    outputs = [*encode(fallback, "hello")[1:], *byte_ids("→😀".encode()), *encode(fallback, "a")[1:]]

    assert fallback.decode(prompt, outputs) == " hello→😀 a"
    # A run of bytes is settled when it ends, since one broken byte in it breaks it all.
    assert pieces(fallback, prompt, outputs) == [" hello", "", "", "", "", "", "", "", "→😀 a", ""]


def test_broken_utf8_reads_as_transformers_decodes_it(fallback: Tokenizer) -> None:
    euro, prompt = "€".encode(), encode(fallback, "hello")

    # Byte fallback: every byte of a run that is not UTF-8 as a whole, its good characters too.
    assert fallback.decode(prompt, byte_ids(euro[:2])) == "\ufffd\ufffd"
    assert fallback.decode(prompt, byte_ids(euro + euro[:1])) == "\ufffd" * 4
    # Byte level: one for each broken character.
    tokenizer, transformers = bundled()
    level = {tokenizer.token_bytes(i): i for i in range(4, 3072)}
    outputs = [level[b"a"], level[euro[:1]], level[euro[1:2]]]
    assert tokenizer.decode([], outputs) == transformers.decode(outputs) == "a\ufffd"


def test_bytes_of_single_tokens_are_their_own(fallback: Tokenizer) -> None:
    hello = encode(fallback, "hello")[-1]

    assert fallback.token_bytes(hello) == b" hello"
    assert fallback.token_bytes(byte_ids(b"\xe2")[0]) == b"\xe2"
    assert fallback.token_bytes(encode(fallback, "é")[-1]) == "é".encode()
    assert fallback.token_bytes(2) == b"</s>"
    assert fallback.token_bytes(100_000) == b""


def test_templated_text_gets_no_second_bos_and_a_bare_prompt_gets_one(fallback: Tokenizer) -> None:
    chat, bare = fallback.encode(
        [Request(line=1, messages=(Message("user", "hello"),)), Request(line=2, prompt="hello")]
    )

    assert chat == bare
    assert isinstance(bare, list)
    assert bare.count(1) == 1


def test_token_ids_are_a_prompt_as_they_are(fallback: Tokenizer) -> None:
    assert fallback.encode([Request(line=1, prompt_token_ids=(7, 1, 7))]) == [[7, 1, 7]]


@settings(max_examples=300, deadline=None)
@given(
    outputs=BUNDLED_IDS,
    start=st.integers(0, 30),
    length=st.integers(1, 6),
    min_tokens=st.integers(0, 10),
)
def test_stop_string_is_found_where_the_text_first_has_it(
    outputs: list[int], start: int, length: int, min_tokens: int
) -> None:
    tokenizer, _ = bundled()
    text = tokenizer.decode([], outputs)
    stop = text[start : start + length]
    if not stop or "\ufffd" in stop:
        return
    watch = StopWatch(tokenizer, [], (stop,), min_tokens)
    num_pushed = 0
    is_stopped = False
    for token in outputs:
        num_pushed += 1
        if is_stopped := watch.push(token):
            break

    # The first occurrence that is whole only with a token after the first min_tokens.
    settled = tokenizer.detokenizer([])
    for token in outputs[:min_tokens]:
        settled.push(token)
    at = text.find(stop, max(len(settled.settled) - len(stop) + 1, 0) if min_tokens else 0)
    assert is_stopped == (at >= 0)
    if is_stopped:
        assert watch.text == text[:at]
        assert num_pushed > min_tokens
        assert text.startswith(tokenizer.decode([], outputs[: watch.num_kept]).rstrip("\ufffd"))
        assert len(tokenizer.decode([], outputs[: watch.num_kept])) >= len(watch.text)
