"""Truncation from the left: what is left of a prompt that is too long for the engine, and the Request that this is."""

import msgspec

from protocol.requests import Request


def keep_end(token_ids: list[int], max_tokens: int, context_tokens: int, first_token_id: int | None) -> list[int]:
    """The end of the prompt that leaves room for `max_tokens` of answer; all of it, the same list, if it fits.

    Where max_tokens alone fills the context, as with an open-ended chat, any room for an answer will do, and a prompt
    that leaves none is cut to half the context. `first_token_id` is the token that begins texts: it stays in front.
    """
    is_open_ended = max_tokens >= context_tokens
    if len(token_ids) <= context_tokens - (1 if is_open_ended else max_tokens):
        return token_ids
    room = context_tokens - (context_tokens // 2 if is_open_ended else max_tokens)
    if token_ids[0] == first_token_id and room > 1:
        return [token_ids[0], *token_ids[1 - room :]]
    return token_ids[-room:]


def of_token_ids(request: Request, token_ids: list[int]) -> Request:
    """The Request with these tokens for a prompt: its answer is another one's, and so is its key."""
    return msgspec.structs.replace(request, prompt=None, messages=None, prompt_token_ids=tuple(token_ids))
