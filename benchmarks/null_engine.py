"""An engine that answers every Sequence at once, so that what is left is the queue; and a worker that runs it.

    python -m benchmarks.null_engine              a worker, configured as `millrace worker` is
    python -m benchmarks.null_engine --fd N ...   its engine process, started by the worker

It speaks the real engine's frames over the real socket: one token per Sequence, one frame for what one Intake brought.
Its model's tokenizer is a real one as well, but makes every prompt one token: the cost of a model's own tokenizer is
the model's, and a plain Celery task that called a model would bear it too.
"""

import argparse
import json
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

from protocol.frames import EngineReady, Intake, StepFrame, receive_frame, send_frame

#: The answer to everything: this token's text.
ANSWER = "ok"
_ANSWER_ID = 1
_MAX_MODEL_LEN = 8192
_MAX_NUM_SEQS = 1024


def write_null_model(folder: Path) -> Path:
    """What a worker needs of a model's files: a tokenizer, and weights that nobody reads."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    # One word alone would look like what transformers makes up where there is no tokenizer.
    model = {"type": "WordLevel", "vocab": {"<unk>": 0, ANSWER: _ANSWER_ID, "not said": 2}, "unk_token": "<unk>"}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
    }
    tokenizer |= {"pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"},
        "config.json": {"model_type": "llama", "vocab_size": 3},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def serve(sock: socket.socket) -> None:
    """Until end-of-file."""
    send_frame(sock, _ready())
    while isinstance(frame := receive_frame(sock), Intake):
        if not frame.add:
            continue
        ids = [new.seq_id for new in frame.add]
        send_frame(
            sock,
            StepFrame(
                seq_ids=np.array(ids, dtype="<i8").tobytes(),
                token_ids=np.full(len(ids), _ANSWER_ID, dtype="<i4").tobytes(),
                finished=[(seq_id, "length", 1) for seq_id in ids],
                num_running=0,
                num_waiting=0,
                num_free_blocks=0,
                num_scheduled_tokens=len(ids),
            ),
        )


def _ready() -> EngineReady:
    return EngineReady(
        fingerprint="null",
        max_model_len=_MAX_MODEL_LEN,
        kv_tokens=_MAX_NUM_SEQS * 64,
        max_num_seqs=_MAX_NUM_SEQS,
        block_size=16,
        device="none",
        dtype="none",
        attention_backend="none",
        versions={},
        vocab_size=3,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fd", type=int)
    parser.add_argument("--settings")
    arguments = parser.parse_args()
    if arguments.fd is not None:
        serve(socket.socket(fileno=arguments.fd))
        return 0
    from protocol.settings import load_settings
    from worker.main import run_worker

    return run_worker(load_settings(), engine_module="benchmarks.null_engine")


if __name__ == "__main__":
    sys.exit(main())
