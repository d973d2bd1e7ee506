"""Text to token ids and back: the model's own tokenizer and chat template, and the watch for stop strings."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protocol.errors import ConfigurationError
from protocol.requests import Failure, Request

logger = logging.getLogger("millrace.worker")

#: Decoding starts this many prompt tokens early, because some tokenizers drop a leading space or need the bytes of
#: the previous token to finish a character.
_CONTEXT_TOKENS = 6
_INCOMPLETE = "�"


class Tokenizer:
    """A model folder's tokenizer. Thread-safe for what the worker does: one thread encodes, another decodes."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigurationError when the folder has no tokenizer that transformers can load."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{folder} has no tokenizer that can be loaded: {error}") from error
        self.eos_token_id: int | None = self._tokenizer.eos_token_id

    def encode(self, requests: Sequence[Request]) -> list[list[int] | Failure]:
        """Token ids per Request, in order; a Request whose messages the template refuses becomes a Failure.

        Templated text carries its own special tokens, so none are added to it; a bare prompt gets the model's.
        """
        texts: list[str | Failure] = [self._render(request) for request in requests]
        encoded: list[list[int] | Failure] = [t if isinstance(t, Failure) else [] for t in texts]
        for is_chat in (False, True):
            chosen = [
                (i, text)
                for i, (request, text) in enumerate(zip(requests, texts, strict=True))
                if isinstance(text, str) and (request.messages is not None) == is_chat
            ]
            if chosen:
                batch = self._tokenizer([text for _, text in chosen], add_special_tokens=not is_chat)["input_ids"]
                for (i, _), ids in zip(chosen, batch, strict=True):
                    encoded[i] = ids or Failure("empty_prompt", "the prompt has no tokens: send at least one character")
        return encoded

    def _render(self, request: Request) -> str | Failure:
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
        """The text that `output_ids` add after `prompt_ids`; special tokens have no text."""
        context = list(prompt_ids[-_CONTEXT_TOKENS:])
        before = self.decode_alone(context)
        both = self.decode_alone(context + list(output_ids))
        # A character that starts in the prompt and ends in the output changes the prompt's text: keep the output whole.
        return both[len(before) :] if both.startswith(before) else self.decode_alone(output_ids)

    def decode_alone(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopWatch:
    """One Sequence's text as it grows, searched for stop strings, also where they cross token borders.

    Only the tokens since the last complete character are decoded again (the windowed scheme of text-generation
    servers: a prefix that is known to be complete, and a tail that may still change).
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._prefix = 0
        self._read = len(self._ids)
        self._stop = stop
        self._longest = max(len(s) for s in stop)
        self.text = ""

    def push(self, token_id: int) -> bool:
        """True when a stop string is complete; `text` then ends just before it, as OpenAI trims it."""
        self._ids.append(token_id)
        known = self._tokenizer.decode_alone(self._ids[self._prefix : self._read])
        grown = self._tokenizer.decode_alone(self._ids[self._prefix :])
        if len(grown) <= len(known) or grown.endswith(_INCOMPLETE):
            return False
        searched_from = max(0, len(self.text) - self._longest + 1)
        self.text += grown[len(known) :]
        self._prefix, self._read = self._read, len(self._ids)
        found = [at for s in self._stop if (at := self.text.find(s, searched_from)) >= 0]
        if not found:
            return False
        self.text = self.text[: min(found)]
        return True
