"""Text to token ids and back: the model's own tokenizer and chat template, and the watch for stop strings."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import ConfigurationError
from protocol.requests import Failure, Request
from worker.detokenizer import Detokenizer, stable_context
from worker.token_bound import TokenBound
from worker.token_bytes import TokenBytes

logger = logging.getLogger("millrace.worker")

#: Tokens that are no special ones, in the vocabulary of any tokenizer that was read from a file.
_MIN_WORDS = 2


@dataclass(frozen=True, slots=True)
class Oversize:
    """A prompt that is too long for certain: at least how many tokens it has, which nobody counted."""

    num_tokens: int
    num_characters: int


class Tokenizer:
    """A model folder's tokenizer. Thread-safe for what the worker does: some threads encode, another decodes."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigurationError when the folder has no tokenizer that transformers can load."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            # What comes from tokenizers is of no narrower type.
            if not isinstance(error, OSError | ValueError) and type(error) is not Exception:
                raise
            raise ConfigurationError(
                f"{folder} has no tokenizer that can be loaded ({error}): copy its files from where the model was "
                "published"
            ) from error
        # Without any file of a tokenizer transformers makes one whose every text is unknown tokens, or none.
        num_words = len(self._tokenizer.get_vocab().keys() - set(self._tokenizer.all_special_tokens))
        if num_words < _MIN_WORDS:
            raise ConfigurationError(
                f"{folder} has no tokenizer that can be loaded: it needs tokenizer.json, or tokenizer.model, or "
                "vocab.json with merges.txt, or vocab.txt, as the model was published with"
            )
        self._backend = _plain_backend(self._tokenizer)
        self.eos_token_id: int | None = self._tokenizer.eos_token_id
        self.bos_token_id: int | None = self._tokenizer.bos_token_id
        #: Stands before a text that is scored from its first token on.
        self.prefix_token_id = self.bos_token_id if self.bos_token_id is not None else self.eos_token_id
        self._token_bytes = TokenBytes(self._tokenizer)
        self.token_bytes = self._token_bytes.of
        self._bound = TokenBound(self._tokenizer, self._backend, self._token_bytes)

    def encode(
        self, requests: Sequence[Request], most: Callable[[Request], int | None] = lambda request: None
    ) -> list[list[int] | Failure | Oversize]:
        """Token ids per Request, in order; a Request whose messages the template refuses becomes a Failure.

        One whose text has more than `most` tokens may become an Oversize, if that can be told at once: to tokenize
        megabytes takes many seconds.

        Templated text carries its own special tokens, so none are added to it; a bare prompt gets the model's. Token
        ids are taken as they are.
        """
        texts: list[str | list[int] | Failure | Oversize] = [self._render(request) for request in requests]
        for i, request in enumerate(requests):
            text, limit = texts[i], most(request)
            if isinstance(text, str) and limit is not None:
                texts[i] = self.oversize(text, limit) or text
        encoded: list[list[int] | Failure | Oversize] = [[] if isinstance(t, str) else t for t in texts]
        for is_chat in (False, True):
            chosen = [
                (i, text)
                for i, (request, text) in enumerate(zip(requests, texts, strict=True))
                if isinstance(text, str) and (request.messages is not None) == is_chat
            ]
            if chosen:
                batch = self._encode_texts([text for _, text in chosen], add_special_tokens=not is_chat)
                for (i, _), ids in zip(chosen, batch, strict=True):
                    encoded[i] = ids or Failure("empty_prompt", "the prompt has no tokens: send at least one character")
        return encoded

    def oversize(self, text: str, most: int) -> Oversize | None:
        """If it is certain that the text has more than so many tokens; telling takes a moment at any length."""
        num_tokens = self._bound.exceeds(text, most)
        return None if num_tokens is None else Oversize(num_tokens, len(text))

    def encode_text(self, text: str) -> list[int]:
        """With the special tokens that the model's tokenizer adds to any text."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def _encode_texts(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def _render(self, request: Request) -> str | list[int] | Failure:
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        if request.messages is None:
            return request.prompt or ""
        if not self._tokenizer.chat_template:
            return Failure("no_chat_template", "this model has no chat template: send 'prompt' instead of 'messages'")
        from jinja2 import TemplateError

        messages = [{"role": m.role, "content": m.content} for m in request.messages]
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError) as error:
            # Templates raise their own sentences ("roles must alternate"); they may not quote what the caller wrote.
            return Failure(
                "chat_template", f"the model's chat template refuses these messages ({type(error).__name__})"
            )
        return text

    def decode(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> str:
        """The text that `output_ids` add after `prompt_ids`."""
        context = stable_context(self._token_bytes, prompt_ids)
        if not context:
            return self.decode_alone(output_ids)
        before = self.decode_alone(context)
        both = self.decode_alone([*context, *output_ids])
        return both[len(before) :] if both.startswith(before) else self.decode_alone(output_ids)

    def decode_alone(self, ids: Sequence[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=True))
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        return Detokenizer(self._token_bytes, self.decode_alone, prompt_ids)


def _plain_backend(tokenizer: Any) -> Any:
    """The tokenizers library's object behind one of transformers', for what that would add nothing but time to: it
    also makes masks, and with them offsets. None where the class has a way of its own."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    methods = ("__call__", "_encode_plus", "decode", "_decode")
    is_plain = isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in methods
    )
    return tokenizer.backend_tokenizer if is_plain else None


class StopWatch:
    """One Sequence's text as it grows, searched for stop strings, also where they cross token borders.

    Before `min_tokens` tokens no stop string counts; one that ends later counts wherever it begins, as in vLLM.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: tuple[str, ...], min_tokens: int = 0
    ) -> None:
        self._detokenizer = tokenizer.detokenizer(prompt_ids)
        self._stop = stop
        self._min_tokens = min_tokens
        self._starts: list[int] = []  # where in the text each token's begins
        self._num_searched = 0  # characters
        self._end: int | None = None

    @property
    def text(self) -> str:
        return self._detokenizer.text[: self._end]

    @property
    def num_kept(self) -> int:
        """Tokens whose text, or a part of it, is in `text`."""
        length = len(self.text)
        return sum(start < length for start in self._starts)

    def push(self, token_id: int) -> bool:
        """True when a stop string is complete; `text` then ends just before it, as OpenAI trims it."""
        watched = self._detokenizer
        self._starts.append(len(watched.settled))
        watched.push(token_id)
        # A broken character may still become another one, other pending text reads the same if the answer ends here.
        text = watched.settled if "�" in watched.pending else watched.text
        if len(self._starts) > self._min_tokens:
            found = [at for s in self._stop if (at := text.find(s, max(self._num_searched - len(s) + 1, 0))) >= 0]
            if found:
                self._end = min(found)
                return True
        self._num_searched = len(watched.settled)
        return False
