"""What crosses the pipe between the Celery process and its engine process, and how it is framed.

A frame is a 4-byte little-endian length and one msgpack body. The engine sends one StepFrame per step; the Celery
process sends one Intake whenever it has something to say. Each side sees the other's death as end-of-file.
"""

import socket
import struct
from typing import Literal

import msgspec

_LENGTH = struct.Struct("<I")
#: A frame larger than this is a bug, not data: 256 MiB holds more tokens than any KV cache.
_MAX_FRAME_BYTES = 1 << 28


class LogitTerms(msgspec.Struct, frozen=True, array_like=True):
    """What changes a Sequence's logits before its tokens are drawn; see protocol.sampling for the meanings."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """One sample to generate. `token_ids` is little-endian int32; `seed` is set for every Sequence that draws.

    With max_tokens=0 nothing is generated: the prompt is put through the model for its scores, or for what an engine
    of another task makes of it.
    `terms` is None for logits that stay as they are; `logprobs` is None when no log-probabilities are wanted.
    `sample_of` is the seq_id of one sent before in the same Intake: the prompt is that one's, `token_ids` is empty, and
    the prompt is computed once for all its samples. Lower `priority` is more urgent, then an earlier `deadline` (in
    seconds since the epoch), then whose turn it is among tenants and their Jobs, then who came first.
    """

    seq_id: int
    token_ids: bytes
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    sample: int
    score_from: int = -1  # log-probabilities of the prompt's tokens from here on are asked for; -1: of none
    num_top: int = 0  # with each of them those of so many best tokens
    min_p: float = 0.0
    terms: LogitTerms | None = None
    logprobs: int | None = None
    sample_of: int | None = None
    priority: int = 0
    deadline: float | None = None
    tenant: str = ""
    job: str = ""


class Intake(msgspec.Struct, frozen=True, array_like=True, tag="intake"):
    """To the engine: Sequences to add, Sequences to finish with the number of output tokens to keep, and Sequences
    whose most urgent waiter is another now, with that one's priority.

    `finish(seq_id, 0)` is a cancel; a Sequence the engine no longer has, or has not yet, is ignored.
    """

    add: list[NewSequence] = []
    finish: list[tuple[int, int]] = []
    urge: list[tuple[int, int]] = []


class EngineReady(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """From the engine, once, when the model is loaded. `kv_tokens` is the KV cache's capacity in tokens."""

    fingerprint: str
    max_model_len: int
    kv_tokens: int
    max_num_seqs: int
    block_size: int
    device: str
    dtype: str
    attention_backend: str
    versions: dict[str, str]
    layout: str = "packed"  # or padded
    num_devices: int = 1  # GPUs that engines of these settings may spread over
    vocab_size: int = 0
    task: str = "generate"  # or embed, or classify: what the engine does with every Sequence it gets
    num_dimensions: int = 0  # of an embedding
    labels: tuple[str, ...] = ()  # of a classification
    quantization: str = "none"  # what is kept in 8 bits: weights, K and V


class EngineFailed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """From the engine instead of EngineReady: why it cannot start. `is_callers` means configuration, not a fault."""

    message: str
    is_callers: bool


FinishReason = Literal["stop", "length"]


class TokenScores(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of a Sequence's prompt tokens from `start` on, each given all tokens before it.

    Little-endian arrays, parallel: `logprobs` float32, `ranks` int32 (1: the most likely), and `num_top` entries per
    token, best first, in `top_ids` (int32) and `top_logprobs` (float32).
    """

    seq_id: int
    start: int
    logprobs: bytes
    ranks: bytes
    num_top: int = 0
    top_ids: bytes = b""
    top_logprobs: bytes = b""


class StepFrame(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """From the engine after each step.

    `seq_ids` (int64) and `token_ids` (int32) are parallel little-endian arrays, one new token each. `finished` holds
    (seq_id, finish reason, number of output tokens): a stop token counts as an output token, though it has no text.
    `refused` holds (seq_id, message) of Sequences that could never finish, which the Celery side should have seen.
    `logprobs` holds (seq_id, piece) for the new tokens of Sequences that asked: the token's log-probability (float32),
    then the ids of the most likely tokens (int32) and their log-probabilities (float32), best first.
    `num_free_blocks` counts those too that still hold a prefix nobody uses. `num_prefix_hit_tokens` are tokens of those
    who started in this step that were not computed, because another Sequence had computed them.
    """

    seq_ids: bytes
    token_ids: bytes
    finished: list[tuple[int, FinishReason, int]]
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_scheduled_tokens: int
    refused: list[tuple[int, str]] = []
    num_padding_tokens: int = 0  # beside the scheduled ones: computed for nobody
    scores: list[TokenScores] = []
    logprobs: list[tuple[int, bytes]] = []
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0  # since the last frame
    num_rows: int = 0  # Sequences in the step
    is_captured: bool = False  # replayed from a CUDA graph
    host_gap_s: float = 0.0  # since the last frame, in which the device had nothing to do while there was work
    #: (seq_id, values) of those finished: an embedding, or the labels' probabilities (little-endian float32).
    pooled: list[tuple[int, bytes]] = []


Frame = Intake | EngineReady | EngineFailed | StepFrame

_encode = msgspec.msgpack.Encoder().encode
_decode: "msgspec.msgpack.Decoder[Frame]" = msgspec.msgpack.Decoder(Frame)


def send_frame(sock: socket.socket, frame: Frame) -> None:
    """Blocks until all is written. Raises OSError (BrokenPipeError among them) when the other side is gone."""
    body = _encode(frame)
    sock.sendall(_LENGTH.pack(len(body)) + body)


def receive_frame(sock: socket.socket) -> Frame | None:
    """The next frame; None at end-of-file, also when the other side died within a frame."""
    header = _read_exactly(sock, _LENGTH.size)
    if header is None:
        return None
    (length,) = _LENGTH.unpack(header)
    if length > _MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is over the limit of {_MAX_FRAME_BYTES}")
    body = _read_exactly(sock, length)
    return None if body is None else _decode.decode(body)


def _read_exactly(sock: socket.socket, num_bytes: int) -> bytes | None:
    buffer = bytearray(num_bytes)
    view, filled = memoryview(buffer), 0
    while filled < num_bytes:
        try:
            received = sock.recv_into(view[filled:])
        except ConnectionResetError:
            return None
        if not received:
            return None
        filled += received
    return bytes(buffer)
