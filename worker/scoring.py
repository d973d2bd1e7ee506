"""Scoring: from a Request of kind score to token ids and the first that is scored, and from the engine's numbers to one
packed score.

A pair of context and continuation is encoded as lm-evaluation-harness does it: blanks that end the context belong to
the continuation, both are encoded together, and the continuation is what comes behind as many tokens as the context
alone has. Without a context, the token that begins texts is the context.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.frames import TokenScores
from protocol.packing import pack_ints
from protocol.requests import Failure, Request
from protocol.scores import ScoredTokens, pack_score, with_texts

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """`token_ids[start:]` are scored, each given all before it."""

    token_ids: list[int]
    start: int


def encode_scored(request: Request, encode: Encode, prefix_token_id: int | None) -> ScoredPrompt | Failure:
    """`encode` adds the special tokens that the model's tokenizer adds to any text."""
    if request.continuation is None:
        return _with_prefix(encode(request.prompt or ""), prefix_token_id)
    context, continuation = request.context or "", request.continuation
    num_blanks = len(context) - len(context.rstrip())
    if num_blanks:
        context, continuation = context[:-num_blanks], context[-num_blanks:] + continuation
    if not context:
        return _with_prefix(encode(continuation), prefix_token_id)
    token_ids, start = encode(context + continuation), len(encode(context))
    if not 0 < start < len(token_ids):
        return Failure(
            "empty_continuation",
            f"the context has {start} tokens and both together have {len(token_ids)}: there is nothing to score",
        )
    return ScoredPrompt(token_ids, start)


def _with_prefix(token_ids: list[int], prefix_token_id: int | None) -> ScoredPrompt | Failure:
    if prefix_token_id is not None and token_ids[:1] != [prefix_token_id]:
        token_ids = [prefix_token_id, *token_ids]
    if len(token_ids) < 2:
        return Failure("empty_continuation", "there is nothing to score: send a text of at least one token")
    # With neither a begin nor an end token in the vocabulary, the first token has nothing before it and goes unscored.
    return ScoredPrompt(token_ids, 1)


@dataclass(slots=True)
class ScoreParts:
    """A Sequence's scores as the engine sends them, piece after piece."""

    start: int
    parts: list[TokenScores] = field(default_factory=list)

    def clear(self) -> None:
        self.parts.clear()

    def pack(self, prompt_ids: list[int], token_bytes: Callable[[int], bytes]) -> bytes:
        """The whole, in the form in which it is stored."""
        parts = sorted(self.parts, key=lambda part: part.start)
        tokens = ScoredTokens(
            token_ids=pack_ints(prompt_ids[self.start :]),
            logprobs=b"".join(part.logprobs for part in parts),
            ranks=b"".join(part.ranks for part in parts),
            num_top=parts[0].num_top if parts else 0,
            top_ids=b"".join(part.top_ids for part in parts),
            top_logprobs=b"".join(part.top_logprobs for part in parts),
            texts={},
        )
        assert len(tokens.logprobs) == len(tokens.token_ids), "the engine has left out scores"
        return pack_score(with_texts(tokens, token_bytes))
