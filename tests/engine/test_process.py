"""The engine process over a real socket pair: start, generate, refuse, and end when the parent does."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from protocol.frames import EngineFailed, EngineReady, Intake, StepFrame, receive_frame, send_frame
from protocol.settings import EngineSettings
from tests.engine.reference import drive, new_sequence, random_prompts, settings_for
from worker.engine.engine import Engine

ROOT = Path(__file__).parents[2]


class Child:
    def __init__(self, process: "subprocess.Popen[str]", sock: socket.socket) -> None:
        self.process = process
        self.sock = sock

    def frame(self) -> object:
        return receive_frame(self.sock)

    def outputs(self, num_finished: int) -> tuple[dict[int, list[int]], list[StepFrame]]:
        """Frames until that many Sequences have finished."""
        outputs: dict[int, list[int]] = {}
        frames: list[StepFrame] = []
        while sum(len(frame.finished) for frame in frames) < num_finished:
            frame = self.frame()
            assert isinstance(frame, StepFrame)
            frames.append(frame)
            seq_ids, token_ids = np.frombuffer(frame.seq_ids, "<i8"), np.frombuffer(frame.token_ids, "<i4")
            for seq_id, token_id in zip(seq_ids.tolist(), token_ids.tolist(), strict=True):
                outputs.setdefault(seq_id, []).append(token_id)
        return outputs, frames


@contextmanager
def engine_process(settings: EngineSettings | str) -> Iterator[Child]:
    text = settings if isinstance(settings, str) else msgspec.json.encode(settings).decode()
    ours, theirs = socket.socketpair()
    ours.settimeout(120)
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.engine.process", "--fd", str(theirs.fileno()), "--settings", text],
        pass_fds=[theirs.fileno()],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    theirs.close()
    with ours, process:
        try:
            yield Child(process, ours)
        finally:
            process.kill()


def test_engine_process_generates_what_the_engine_in_process_does(model_folder: Callable[[str], Path]) -> None:
    settings = settings_for(model_folder("qwen3"))
    sequences = [new_sequence(i, prompt, 12) for i, prompt in enumerate(random_prompts(6, seed=3))]
    expected = drive(Engine.start(settings), sequences)

    with engine_process(settings) as child:
        ready = child.frame()
        assert isinstance(ready, EngineReady)
        send_frame(child.sock, Intake(add=sequences[:4]))
        send_frame(child.sock, Intake(add=sequences[4:]))
        outputs, frames = child.outputs(num_finished=6)
        child.sock.close()
        _, stderr = child.process.communicate(timeout=30)

    assert ready.fingerprint == Engine.start(settings).fingerprint
    assert (ready.device, ready.dtype, ready.attention_backend) == ("cpu", "float32", "sparse")
    assert (ready.max_model_len, ready.kv_tokens, ready.block_size) == (512, 8192, 16)
    assert outputs == expected.outputs
    assert frames[-1].num_running == frames[-1].num_waiting == 0
    assert frames[-1].num_free_blocks == 8192 // 16
    assert child.process.returncode == 0
    assert "attention backend sparse" in stderr


def test_engine_process_finishes_a_sequence_when_told_to(model_folder: Callable[[str], Path]) -> None:
    with engine_process(settings_for(model_folder("llama"))) as child:
        assert isinstance(child.frame(), EngineReady)
        send_frame(child.sock, Intake(add=[new_sequence(1, [5, 6, 7], 500)]))
        first = child.frame()
        assert isinstance(first, StepFrame)
        assert first.num_running == 1
        send_frame(child.sock, Intake(finish=[(1, 1), (99, 0)], add=[new_sequence(2, [5, 6, 7], 3)]))
        _, frames = child.outputs(num_finished=1)

    assert frames[-1].finished == [(2, "length", 3)]
    assert (frames[-1].num_running, frames[-1].num_free_blocks) == (0, 8192 // 16)


def test_engine_process_starts_what_somebody_more_urgent_waits_for(model_folder: Callable[[str], Path]) -> None:
    bulk = [msgspec.structs.replace(new_sequence(i, [5 + i], 40), priority=2) for i in range(5)]
    with engine_process(settings_for(model_folder("llama"), max_num_seqs=1)) as child:
        assert isinstance(child.frame(), EngineReady)
        send_frame(child.sock, Intake(add=bulk))
        assert isinstance(child.frame(), StepFrame)
        send_frame(child.sock, Intake(urge=[(4, 0), (99, 0)]))
        _, frames = child.outputs(num_finished=5)

    assert [seq_id for frame in frames for seq_id, _, _ in frame.finished] == [4, 0, 1, 2, 3]


def test_engine_process_refuses_what_never_fits_and_goes_on(model_folder: Callable[[str], Path]) -> None:
    with engine_process(settings_for(model_folder("llama"))) as child:
        assert isinstance(child.frame(), EngineReady)
        send_frame(child.sock, Intake(add=[new_sequence(1, [5] * 500, 13)]))
        refusal = child.frame()
        send_frame(child.sock, Intake(add=[new_sequence(2, [5], 2)]))
        _, frames = child.outputs(num_finished=1)

    assert isinstance(refusal, StepFrame)
    ((seq_id, message),) = refusal.refused
    assert seq_id == 1
    assert "513" in message
    assert "512" in message
    assert frames[-1].finished == [(2, "length", 2)]


@pytest.mark.parametrize("is_busy", [True, False])
def test_engine_process_ends_at_end_of_file(is_busy: bool, model_folder: Callable[[str], Path]) -> None:
    with engine_process(settings_for(model_folder("gpt2"))) as child:
        assert isinstance(child.frame(), EngineReady)
        if is_busy:
            send_frame(child.sock, Intake(add=[new_sequence(i, [5], 500) for i in range(64)]))
            assert isinstance(child.frame(), StepFrame)
        child.sock.close()
        assert child.process.wait(timeout=30) == 0


def test_engine_process_ends_at_end_of_file_while_it_loads(model_folder: Callable[[str], Path]) -> None:
    with engine_process(settings_for(model_folder("gpt2"))) as child:
        child.sock.close()
        assert child.process.wait(timeout=60) == 0


def test_engine_process_leaves_signals_to_its_parent(model_folder: Callable[[str], Path]) -> None:
    with engine_process(settings_for(model_folder("llama"))) as child:
        assert isinstance(child.frame(), EngineReady)
        # A service manager and a terminal send them to everybody; the parent still has work to wind up.
        child.process.send_signal(signal.SIGINT)
        child.process.terminate()
        send_frame(child.sock, Intake(add=[new_sequence(1, [5], 2)]))
        child.outputs(num_finished=1)
        child.sock.close()
        assert child.process.wait(timeout=30) == 0


def test_engine_process_says_why_it_cannot_start(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"

    with engine_process(settings_for(missing)) as child:
        failed = child.frame()
        assert child.process.wait(timeout=30) == 1

    assert isinstance(failed, EngineFailed)
    assert failed.is_callers
    assert str(missing) in failed.message
    assert "config.json" in failed.message


def test_engine_process_refuses_settings_it_does_not_know() -> None:
    with engine_process('{"modell": "x"}') as child:
        failed = child.frame()

    assert isinstance(failed, EngineFailed)
    assert failed.is_callers
    assert "modell" in failed.message


def test_engine_process_imports_no_queue_and_no_database() -> None:
    code = (
        "import sys, worker.engine.process, worker.engine.backends.sdpa\n"
        "print([name for name in ('celery', 'kombu', 'redis', 'sqlalchemy') if name in sys.modules])"
    )

    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "[]"
