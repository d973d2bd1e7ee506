"""The least number of tokens a text can have: never more than it has, and near enough to spare the tokenizer's time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as TokenizerModel
from tokenizers.models import Unigram, WordPiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from worker.token_bound import TokenBound
from worker.token_bytes import TokenBytes

BUNDLED = Path(__file__).parents[2] / "models/millrace-tiny"

#: Words of the vocabularies, what they have no token for, blanks of all kinds, and what composing makes shorter.
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            [
                "the queue holds",
                " worker",
                "hello",
                "▁▁▁hello",
                "def f(self):\n",
                " " * 40,
                "<eos>",
                "<x>",
                "\u3000\u2003",
            ]
        ),
        st.sampled_from(["e\u0301" * 30, "\u1112\u1161\u11ab" * 20, "a\u030a\u0323", "é" * 20, "한" * 20]),
    ),
    max_size=6,
).map("".join)


def bound_of(tokenizer: Any) -> TokenBound:
    return TokenBound(tokenizer, tokenizer.backend_tokenizer, TokenBytes(tokenizer))


def with_nfc(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


def with_greedy_token(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True)])


def with_removal(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.ByteLevel(use_regex=False)]
    )


def untouched(_: Any) -> None:
    pass


@pytest.mark.parametrize("change", [untouched, with_nfc, with_greedy_token])
@pytest.mark.parametrize("folder", ["bundled", "tokenizer_folder", "byte_fallback_folder"])
def test_no_text_has_fewer_tokens_than_its_bound(
    folder: str, change: Callable[[Any], None], request: pytest.FixtureRequest
) -> None:
    path = BUNDLED if folder == "bundled" else request.getfixturevalue(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    if folder == "byte_fallback_folder" and change is with_nfc:
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), tokenizer.backend_tokenizer.normalizer]
        )
    else:
        change(tokenizer)
    bound = bound_of(tokenizer)
    assert bound.exceeds("hello the queue" * 100, 1) is not None

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        num_tokens = len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        assert (bound.exceeds(text, 0) or 0) <= num_tokens
        assert bound.exceeds(text, num_tokens) is None

    check()


def test_a_long_text_is_known_to_be_too_long() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(BUNDLED))
    text = (Path(__file__).read_text() + " é") * 20
    num_tokens = len(tokenizer.backend_tokenizer.encode(text).ids)
    least = bound_of(tokenizer).exceeds(text, num_tokens // 20)
    assert least is not None
    assert num_tokens // 20 < least <= num_tokens


def test_of_tokenizers_that_leave_something_out_nothing_is_said(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    with_removal(tokenizer)
    others = [
        PreTrainedTokenizerFast(tokenizer_object=TokenizerModel(model), unk_token="<unk>")
        for model in (
            WordPiece({"<unk>": 0, "a": 1}, unk_token="<unk>", max_input_chars_per_word=100),
            Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0),
        )
    ]
    for each in (tokenizer, *others):
        assert bound_of(each).exceeds("a " * 10_000, 1) is None
    assert TokenBound(tokenizer, None, TokenBytes(tokenizer)).exceeds("a" * 10_000, 1) is None
