"""Tokenizer and StopWatch against a real byte-level tokenizer."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ConfigurationError
from protocol.requests import Failure, Message, Request
from worker.text import Oversize, StopWatch, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer(tokenizer_folder)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    (ids,) = tokenizer.encode([Request(line=1, prompt=text)])
    assert isinstance(ids, list)
    return ids


def test_encoding_keeps_the_order_of_prompts_and_chats(tokenizer: Tokenizer) -> None:
    chat = Request(line=2, messages=(Message("user", "the queue"),))
    first, templated, last = tokenizer.encode([Request(line=1, prompt="the"), chat, Request(line=3, prompt="worker")])
    assert isinstance(first, list)
    assert isinstance(last, list)
    assert isinstance(templated, list)
    assert tokenizer.decode_alone(first) == "the"
    assert tokenizer.decode_alone(last) == "worker"
    # The template's <bos> is one special token, and no second one is added in front of it.
    assert templated == encode(tokenizer, "<bos><user>the queue\n<assistant>")


def test_messages_that_the_template_refuses_fail_alone_and_are_not_quoted(tokenizer: Tokenizer) -> None:
    refused = Request(line=1, messages=(Message("robot", "a secret"),))
    failure, ids = tokenizer.encode([refused, Request(line=2, prompt="the")])
    assert isinstance(failure, Failure)
    assert failure.code == "chat_template"
    assert "secret" not in failure.message
    assert isinstance(ids, list)


def test_an_empty_prompt_is_refused(tokenizer: Tokenizer) -> None:
    (failure,) = tokenizer.encode([Request(line=1, prompt="")])
    assert isinstance(failure, Failure)
    assert failure.code == "empty_prompt"


def test_what_is_too_long_for_certain_is_not_tokenized(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    encode_texts = tokenizer._encode_texts

    def record(texts: list[str], **options: bool) -> list[list[int]]:
        asked.extend(texts)
        return encode_texts(texts, **options)

    monkeypatch.setattr(tokenizer, "_encode_texts", record)
    huge = "the queue holds the prompts " * 10_000
    requests = [
        Request(line=1, prompt=huge),
        Request(line=2, messages=(Message("user", huge),)),
        Request(line=3, prompt="the"),
        Request(line=4, prompt=huge),
    ]
    first, chat, short, unlimited = tokenizer.encode(requests, lambda r: None if r.line == 4 else 100)

    assert isinstance(first, Oversize)
    assert isinstance(chat, Oversize)
    assert (first.num_characters, first.num_tokens > 100) == (len(huge), True)
    assert isinstance(short, list)
    assert isinstance(unlimited, list)
    assert len(unlimited) >= first.num_tokens
    assert asked == ["the", huge]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "gemma3_text", "xlm-roberta", "mpnet"])
def test_a_folder_without_a_tokenizer_is_named(family: str, tmp_path: Path) -> None:
    """For some families transformers makes up one that takes every text for unknown tokens."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ConfigurationError, match=f"{tmp_path} has no tokenizer that can be loaded"):
        Tokenizer(tmp_path)


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(min_size=1, max_size=30), output=st.text(max_size=30))
def test_decoding_the_output_after_its_prompt_gives_the_output(prompt: str, output: str) -> None:
    tokenizer = test_decoding_the_output_after_its_prompt_gives_the_output.tokenizer  # type: ignore[attr-defined]
    output_ids = encode(tokenizer, output) if output else []
    assert tokenizer.decode(encode(tokenizer, prompt), output_ids) == output


@pytest.fixture(scope="module", autouse=True)
def _share_tokenizer(tokenizer: Tokenizer) -> None:
    # hypothesis runs one function many times, so it takes the tokenizer from here and not as a fixture.
    for function in (test_decoding_the_output_after_its_prompt_gives_the_output, test_a_stop_string_cuts_as_find_does):
        function.tokenizer = tokenizer  # type: ignore[attr-defined]


@settings(max_examples=300, deadline=None)
@given(
    output=st.text(alphabet="abcdé😀 \n", min_size=1, max_size=60),
    stop=st.lists(st.text(alphabet="abcdé😀 \n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_string_cuts_as_find_does(output: str, stop: list[str]) -> None:
    tokenizer = test_a_stop_string_cuts_as_find_does.tokenizer  # type: ignore[attr-defined]
    watch = StopWatch(tokenizer, encode(tokenizer, "the"), tuple(stop))
    seen = ""
    is_stopped = False
    for token in encode(tokenizer, output):
        is_stopped = watch.push(token)
        if is_stopped:
            break
        seen = watch.text
    ends = [output.find(s) for s in stop if s in output]
    assert is_stopped == bool(ends)
    if not ends:
        assert watch.text == output
    else:
        # Nothing that a stop string starts is kept, and nothing before the token that completed it is lost.
        assert output.startswith(watch.text)
        assert all(s not in watch.text for s in stop)
        assert len(watch.text) >= min(ends) - max(map(len, stop))
        assert any(output.startswith(s, len(watch.text)) for s in stop)
        assert watch.text.startswith(seen[: len(watch.text)])
