"""The registry of running generations, driven with frames as the engine sends them."""

from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from protocol.frames import FinishReason, Intake, LogitTerms, StepFrame
from protocol.logprobs import unpack_logprobs
from protocol.packing import unpack_ints
from protocol.requests import Answer, Failure, Request
from protocol.sampling import SamplingParams, resolve
from tests.worker.recording_owner import RecordingOwner
from worker.generations import Generation, Generations, Piece
from worker.owner import Owner
from worker.text import Tokenizer


class Harness:
    """Generations with both ends recorded: what was sent to the engine, and what was handed on as done."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer(folder)
        self.eos = cast("int", self.tokenizer.eos_token_id)
        self.sent: list[Intake] = []
        self.sent_to: list[int] = []
        self.done: list[tuple[Generation, Answer | Failure]] = []
        self.generations = Generations(self.tokenizer, (self.eos,), self._send, self.done.extend)
        self.owner = RecordingOwner()

    def _send(self, engine: int, intake: Intake) -> None:
        self.sent.append(intake)
        self.sent_to.append(engine)

    def ids(self, text: str) -> list[int]:
        (ids,) = self.tokenizer.encode([Request(line=1, prompt=text)])
        assert isinstance(ids, list)
        return ids

    def piece(self, key: bytes | None, owner: Owner | None = None, **params: Any) -> Piece:
        resolved = resolve(SamplingParams(**params), max_tokens=16)
        return Piece(owner or self.owner, Request(line=1, prompt="the"), resolved, 0, key)

    def step(
        self,
        *tokens: tuple[int, int],
        finished: list[tuple[int, FinishReason, int]] | None = None,
        logprobs: list[tuple[int, bytes]] | None = None,
    ) -> None:
        seq_ids = np.array([t[0] for t in tokens], dtype="<i8").tobytes()
        token_ids = np.array([t[1] for t in tokens], dtype="<i4").tobytes()
        self.generations.on_step(
            StepFrame(seq_ids, token_ids, finished or [], 1, 0, 1, len(tokens), logprobs=logprobs or [])
        )


@pytest.fixture
def harness(tokenizer_folder: Path) -> Harness:
    return Harness(tokenizer_folder)


def test_a_finished_sequence_becomes_text_without_its_stop_token(harness: Harness) -> None:
    harness.generations.add([(harness.piece(b"k"), harness.ids("the"))], 100)
    (sequence,) = harness.sent[0].add
    tokens = [*harness.ids(" queue holds"), harness.eos]
    for token in tokens[:-1]:
        harness.step((sequence.seq_id, token))
    harness.step((sequence.seq_id, harness.eos), finished=[(sequence.seq_id, "stop", len(tokens))])
    ((_, answer),) = harness.done
    assert answer == Answer(text=" queue holds", finish_reason="stop", prompt_tokens=1, completion_tokens=len(tokens))
    assert (harness.generations.num_live, harness.generations.num_tokens) == (0, 0)


def test_equal_requests_run_once_and_both_get_the_answer(harness: Harness) -> None:
    first, second, third = (harness.piece(b"k") for _ in range(3))
    harness.generations.add([(first, [5]), (second, [5])], 100)
    assert harness.generations.join(third) is True
    (sequence,) = harness.sent[0].add
    harness.step((sequence.seq_id, 9), finished=[(sequence.seq_id, "length", 1)])
    ((generation, _),) = harness.done
    assert generation.waiters == [first, second, third]


def test_an_answer_stays_joinable_until_it_is_committed(harness: Harness) -> None:
    harness.generations.add([(harness.piece(b"k"), [5])], 100)
    (sequence,) = harness.sent[0].add
    harness.step((sequence.seq_id, 9), finished=[(sequence.seq_id, "length", 1)])
    joined = harness.generations.join(harness.piece(b"k"))
    assert isinstance(joined, Answer)
    harness.generations.committed([b"k"])
    assert harness.generations.join(harness.piece(b"k")) is False


def test_a_stop_string_ends_the_sequence_in_the_engine_and_later_tokens_are_ignored(harness: Harness) -> None:
    harness.generations.add([(harness.piece(None, stop=("hold",)), harness.ids("the"))], 100)
    (sequence,) = harness.sent[0].add
    tokens = harness.ids(" queue holds the")
    for token in tokens:
        harness.step((sequence.seq_id, token))
    ((_, answer),) = harness.done
    assert isinstance(answer, Answer)
    assert (answer.text, answer.finish_reason) == (" queue ", "stop")
    assert harness.sent[1:] == [Intake(finish=[(sequence.seq_id, answer.completion_tokens)])]
    assert answer.completion_tokens < len(tokens)


def test_a_new_engine_is_told_everything_again_and_outputs_start_over(harness: Harness) -> None:
    harness.generations.add([(harness.piece(b"k"), [5]), (harness.piece(b"l"), [6])], 100)
    one, two = harness.sent[0].add
    harness.step((one.seq_id, 7), (two.seq_id, 8))
    harness.generations.on_engine_death()
    connected: list[bool] = []
    harness.generations.resend(lambda: connected.append(True))
    assert connected == [True]
    assert harness.sent[-1].add == [one, two]
    harness.step((one.seq_id, 7), finished=[(one.seq_id, "length", 1)])
    ((_, answer),) = harness.done
    assert isinstance(answer, Answer)
    assert answer.completion_tokens == 1


def test_what_the_engine_dies_of_even_alone_fails_and_the_rest_is_sent_again(harness: Harness) -> None:
    harness.generations.max_aboard = 2
    harness.generations.add([(harness.piece(b"bad"), [5]), (harness.piece(b"good"), [6])], 100)
    bad, good = harness.sent[0].add
    for _ in range(3):
        harness.generations.on_engine_death()
        harness.generations.resend(lambda: None)
    ((generation, failure),) = harness.done
    assert (generation.key, isinstance(failure, Failure) and failure.code) == (b"bad", "engine_died")
    assert [intake.add for intake in harness.sent[1:]] == [[bad, good], [bad], [good]]


def test_an_answer_that_the_context_cut_short_is_nobody_elses(harness: Harness) -> None:
    harness.generations.add([(harness.piece(b"k", max_tokens=500), [5] * 98)], 100)
    (sequence,) = harness.sent[0].add
    assert sequence.max_tokens == 2
    harness.step((sequence.seq_id, 9))
    harness.step((sequence.seq_id, 9), finished=[(sequence.seq_id, "length", 2)])
    ((generation, answer),) = harness.done
    assert isinstance(answer, Answer)
    assert not generation.is_kept(answer)
    assert harness.generations.join(harness.piece(b"k", max_tokens=500)) is False


def test_abandoning_an_owner_cancels_only_what_nobody_else_waits_for(harness: Harness) -> None:
    mine, other = RecordingOwner(), RecordingOwner()
    shared, alone = harness.piece(b"s", mine), harness.piece(b"a", mine)
    harness.generations.add([(shared, [5]), (alone, [6])], 100)
    assert harness.generations.join(harness.piece(b"s", other)) is True
    running_shared, running_alone = harness.sent[0].add
    harness.generations.abandon(mine)
    assert harness.sent[1:] == [Intake(finish=[(running_alone.seq_id, 0)])]
    harness.step((running_shared.seq_id, 9), finished=[(running_shared.seq_id, "length", 1)])
    ((generation, _),) = harness.done
    assert [w.owner for w in generation.waiters] == [other]


def test_suspects_that_nobody_waits_for_any_more_end_together(harness: Harness) -> None:
    innocent = harness.piece(None, owner=RecordingOwner())
    harness.generations.add([(harness.piece(None), [5]), (harness.piece(None), [6])], 100)
    one, two = harness.sent[0].add
    for _ in range(2):
        harness.step((one.seq_id, 7), (two.seq_id, 8))
        harness.generations.on_engine_death()
        harness.generations.resend(lambda: None)
    harness.generations.add([(innocent, [7])], 100)
    # They run apart now, and everybody else after them.
    assert [new.seq_id for new in harness.sent[-1].add] == [one.seq_id]
    told = len(harness.sent)

    harness.generations.abandon(harness.owner)

    assert harness.sent[told] == Intake(finish=[(one.seq_id, 0), (two.seq_id, 0)])
    (last,) = harness.sent[told + 1 :]
    assert [unpack_ints(new.token_ids) for new in last.add] == [(7,)]
    assert harness.generations.num_live == 1


def test_what_somebody_more_urgent_joins_becomes_as_urgent(harness: Harness) -> None:
    bulk, call = RecordingOwner(priority=2), RecordingOwner(priority=-1)
    harness.generations.add([(harness.piece(b"s", bulk), [5, 6]), (harness.piece(b"a", bulk), [6])], 100)
    shared, _ = harness.sent[0].add
    num_tokens = 2 + shared.max_tokens
    assert harness.generations.promised(0) == (0, 0)
    assert harness.generations.join(harness.piece(b"s", call)) is True
    assert harness.sent[1:] == [Intake(urge=[(shared.seq_id, -1)])]
    assert harness.generations.promised(0) == (1, num_tokens)
    assert harness.generations.join(harness.piece(b"s", bulk)) is True
    assert len(harness.sent) == 2
    # A new engine is told so from the beginning.
    harness.generations.resend(lambda: None)
    assert [sequence.priority for sequence in harness.sent[2].add] == [-1, 2]
    harness.step((shared.seq_id, 9), finished=[(shared.seq_id, "length", 1)])
    assert harness.generations.promised(0) == (0, 0)
    assert harness.generations.promised(2)[0] == 1


def test_what_the_most_urgent_no_longer_waits_for_is_as_urgent_as_the_next(harness: Harness) -> None:
    bulk, normal, call, late = (RecordingOwner(priority=priority) for priority in (2, 1, -1, 0))
    harness.generations.add([(harness.piece(b"s", call), [5, 6]), (harness.piece(b"a", bulk), [6])], 100)
    shared, other = harness.sent[0].add
    assert harness.generations.join(harness.piece(b"s", bulk)) is True
    assert harness.generations.join(harness.piece(b"s", normal)) is True
    assert harness.generations.join(msgspec.structs.replace(harness.piece(b"a", late), deadline=50.0)) is True
    del harness.sent[:]

    harness.generations.abandon(call)
    assert harness.sent == [Intake(urge=[(shared.seq_id, 1)])]
    harness.generations.abandon(normal)
    assert harness.sent[1:] == [Intake(urge=[(shared.seq_id, 2)])]
    assert harness.generations.promised(0)[0] == 1
    assert [piece.owner for piece in harness.generations.expire(60.0)] == [late]
    assert harness.sent[2:] == [Intake(urge=[(other.seq_id, 2)])]
    assert (harness.generations.promised(1)[0], harness.generations.promised(2)[0]) == (0, 2)


def test_nothing_is_started_for_an_owner_that_gave_up_while_it_was_prepared(harness: Harness) -> None:
    lost = RecordingOwner()
    harness.generations.abandon(lost)
    harness.generations.add([(harness.piece(b"k", lost), [5]), (harness.piece(None, lost), [5])], 100)
    assert harness.sent == []
    assert harness.generations.num_live == 0


def test_a_passed_deadline_ends_who_waits_until_then_and_frees_what_nobody_else_waits_for(harness: Harness) -> None:
    def piece(key: bytes, deadline: float | None) -> Piece:
        return msgspec.structs.replace(harness.piece(key), deadline=deadline)

    early, late, patient, alone = piece(b"s", 10.0), piece(b"s", 20.0), piece(b"s", None), piece(b"a", 10.0)
    harness.generations.add([(early, [5]), (alone, [6]), (late, [5]), (patient, [5])], 100)
    _, running_alone = harness.sent[0].add
    assert [sequence.deadline is not None for sequence in harness.sent[0].add] == [True, True]

    assert harness.generations.expire(9.9) == []
    assert harness.generations.expire(10.0) == [early, alone]
    assert harness.sent[1:] == [Intake(finish=[(running_alone.seq_id, 0)])]
    assert harness.generations.expire(19.9) == []
    assert harness.generations.expire(25.0) == [late]
    assert harness.generations.expire(1e9) == []
    assert harness.generations.num_live == 1


def test_every_parameter_reaches_the_engine(harness: Harness) -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "seed": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {5: 1.0},
        "min_tokens": 2,
        "logprobs": 4,
    }
    harness.generations.add([(harness.piece(None, **given), [5]), (harness.piece(None), [5])], 100)
    new, plain = harness.sent[0].add
    sent = msgspec.structs.asdict(new)
    terms = sent.pop("terms")
    assert {name: sent[name] for name in given if name in sent} == {n: v for n, v in given.items() if n in sent}
    assert terms == LogitTerms(1.2, 0.5, -0.5, {5: 1.0}, 2)
    # What nobody asked for costs the engine nothing.
    assert (plain.terms, plain.min_p, plain.logprobs) == (None, 0.0, None)


def test_stop_token_ids_end_an_answer_without_text_also_with_ignore_eos(harness: Harness) -> None:
    harness.generations.add(
        [
            (harness.piece(None, stop_token_ids=(9,)), [5]),
            (harness.piece(None, stop_token_ids=(9,), ignore_eos=True), [5]),
            (harness.piece(None, ignore_eos=True), [5]),
        ],
        100,
    )
    both, own, none = harness.sent[0].add
    assert set(both.stop_token_ids) == {9, harness.eos}
    assert (own.stop_token_ids, none.stop_token_ids) == ((9,), ())
    (queue,) = harness.ids(" queue")
    harness.step((own.seq_id, queue))
    harness.step((own.seq_id, 9), finished=[(own.seq_id, "stop", 2)])
    ((_, answer),) = harness.done
    assert answer == Answer(text=" queue", finish_reason="stop", prompt_tokens=1, completion_tokens=2)


def test_min_tokens_lets_an_early_stop_string_pass(harness: Harness) -> None:
    harness.generations.add([(harness.piece(None, stop=("queue",), min_tokens=3), harness.ids("the"))], 100)
    (sequence,) = harness.sent[0].add
    tokens = harness.ids(" queue holds the queue")
    for token in tokens:
        harness.step((sequence.seq_id, token))
    ((_, answer),) = harness.done
    assert isinstance(answer, Answer)
    assert answer.text == " queue holds the "


def test_each_sample_of_a_request_is_cut_at_its_own_stop_string(harness: Harness) -> None:
    prompt, owner = harness.ids("the"), harness.owner
    params = resolve(SamplingParams(stop=("ds the",), n=2, temperature=1.0), max_tokens=16)
    request = Request(line=1, prompt="the")
    harness.generations.add([(Piece(owner, request, params, sample, None), prompt) for sample in range(2)], 100)
    first, second = harness.sent[0].add
    assert (first.sample, second.sample, second.sample_of) == (0, 1, first.seq_id)
    for one, other in zip(harness.ids(" queue holds the queue"), harness.ids(" worker queue holds the"), strict=True):
        harness.step((first.seq_id, one), (second.seq_id, other))
    texts = {g.sample: outcome.text for g, outcome in harness.done if isinstance(outcome, Answer)}
    assert texts == {0: " queue hol", 1: " worker queue hol"}


def pieces(generation_id: int, logprob: float, *top: tuple[int, float]) -> list[tuple[int, bytes]]:
    ids = np.array([token for token, _ in top], dtype="<i4").tobytes()
    values = np.array([value for _, value in top], dtype="<f4").tobytes()
    return [(generation_id, np.float32(logprob).tobytes() + ids + values)]


def test_log_probabilities_come_with_the_tokens_of_the_text_alone(harness: Harness) -> None:
    queue, holds = harness.ids(" queue"), harness.ids(" holds")
    assert len(queue) == len(holds) == 1
    harness.generations.add([(harness.piece(b"k", logprobs=2), [5])], 100)
    (sequence,) = harness.sent[0].add
    top = ((queue[0], -0.25), (holds[0], -1.5))
    harness.step((sequence.seq_id, queue[0]), logprobs=pieces(sequence.seq_id, -0.25, *top))
    harness.step(
        (sequence.seq_id, harness.eos),
        finished=[(sequence.seq_id, "stop", 2)],
        logprobs=pieces(sequence.seq_id, -0.5, *top),
    )
    ((_, answer),) = harness.done
    assert isinstance(answer, Answer)
    assert answer.logprobs is not None
    (token,) = unpack_logprobs(answer.logprobs).content
    assert (token.token, token.logprob, bytes(token.bytes)) == (" queue", -0.25, b" queue")
    assert [(other.token, other.logprob) for other in token.top_logprobs] == [(" queue", -0.25), (" holds", -1.5)]


def test_log_probabilities_end_with_the_text_before_a_stop_string(harness: Harness) -> None:
    harness.generations.add([(harness.piece(None, stop=("ds the w",), logprobs=0), harness.ids("the"))], 100)
    (sequence,) = harness.sent[0].add
    tokens = harness.ids(" queue holds the worker")
    for i, token in enumerate(tokens):
        harness.step((sequence.seq_id, token), logprobs=pieces(sequence.seq_id, -float(i)))
    ((_, answer),) = harness.done
    assert isinstance(answer, Answer)
    assert answer.text == " queue hol"
    assert answer.logprobs is not None
    content = unpack_logprobs(answer.logprobs).content
    # The token that the stop string begins in is the last one.
    assert "".join(token.token for token in content).startswith(answer.text)
    assert not "".join(token.token for token in content[:-1]).startswith(answer.text)
    assert len(content) < answer.completion_tokens <= len(tokens)


def test_a_new_engine_starts_log_probabilities_over_too(harness: Harness) -> None:
    harness.generations.add([(harness.piece(None, logprobs=0), [5])], 100)
    (sequence,) = harness.sent[0].add
    (queue,) = harness.ids(" queue")
    harness.step((sequence.seq_id, queue), logprobs=pieces(sequence.seq_id, -1.0))
    harness.generations.on_engine_death()
    harness.generations.resend(lambda: None)
    harness.step(
        (sequence.seq_id, queue),
        finished=[(sequence.seq_id, "length", 1)],
        logprobs=pieces(sequence.seq_id, -2.0),
    )
    ((_, answer),) = harness.done
    assert isinstance(answer, Answer)
    assert answer.logprobs is not None
    assert [token.logprob for token in unpack_logprobs(answer.logprobs).content] == [-2.0]


def test_the_context_bounds_the_tokens_promised(harness: Harness) -> None:
    harness.generations.add([(harness.piece(None, max_tokens=500), [5] * 90)], 100)
    assert harness.sent[0].add[0].max_tokens == 10
    assert harness.generations.num_tokens == 100


def test_what_steps_report_adds_up(harness: Harness) -> None:
    for hits, preemptions in ((16, 0), (0, 2), (32, 1)):
        frame = StepFrame(
            b"", b"", [], 1, 0, 7, 5,
            num_prefix_hit_tokens=hits, num_preemptions=preemptions, num_padding_tokens=2,
            num_rows=4, is_captured=hits > 0, host_gap_s=0.5,
        )  # fmt: skip
        harness.generations.on_step(frame)
    generations = harness.generations
    assert (generations.num_computed_tokens, generations.num_prefix_hit_tokens) == (15, 48)
    assert generations.num_preemptions == 3
    assert (generations.num_steps, generations.num_captured_steps, generations.num_step_rows) == (3, 2, 12)
    assert (generations.num_padding_tokens, generations.host_gap_s, generations.num_free_blocks) == (6, 1.5, 7)


def test_samples_of_one_request_send_their_prompt_once_and_again_to_a_new_engine(harness: Harness) -> None:
    prompt, other = harness.ids("the queue"), harness.ids("the queue")
    pieces = [(harness.piece(bytes([i]), temperature=1.0, seed=7), prompt) for i in range(3)]
    harness.generations.add([pieces[0], (harness.piece(b"o"), other), *pieces[1:]], 100)
    first, alone, second, third = harness.sent[0].add
    assert np.frombuffer(first.token_ids, "<i4").tolist() == prompt
    assert (first.sample_of, alone.sample_of, second.sample_of, third.sample_of) == (
        None,
        None,
        first.seq_id,
        first.seq_id,
    )
    assert alone.token_ids == first.token_ids
    assert second.token_ids == third.token_ids == b""
    harness.step((first.seq_id, 9), finished=[(first.seq_id, "length", 1)])
    harness.generations.resend(lambda: None)
    assert harness.sent[-1].add == [
        alone,
        msgspec.structs.replace(second, token_ids=first.token_ids, sample_of=None),
        msgspec.structs.replace(third, sample_of=second.seq_id),
    ]


def test_work_goes_to_the_engine_that_owes_least_and_comes_back_to_it_after_its_death(harness: Harness) -> None:
    generations = harness.generations
    generations.num_engines = 2
    generations.add([(harness.piece(None), [5] * 40)], 100)
    generations.add([(harness.piece(None), [6] * 5)], 100)
    generations.add([(harness.piece(None), [7] * 5)], 100)
    assert harness.sent_to == [0, 1, 1]

    generations.on_engine_death(1)
    generations.add([(harness.piece(None), [8] * 90)], 100)
    assert harness.sent_to == [0, 1, 1, 0]
    generations.resend(lambda: None, 1)

    assert harness.sent_to[4:] == [1]
    again = [harness.sent[1].add[0], harness.sent[2].add[0]]
    assert harness.sent[4].add == again
    generations.add([(harness.piece(None), [9])], 100)
    assert harness.sent_to[5:] == [1]


def test_samples_of_a_prompt_go_to_one_engine_and_cancels_follow_their_work(harness: Harness) -> None:
    generations = harness.generations
    generations.num_engines = 2
    shared, other = [5] * 10, [6] * 10
    owner = RecordingOwner()
    pieces = [(harness.piece(None, owner), prompt) for prompt in (shared, other, shared, shared)]
    generations.add([(piece, prompt) for piece, prompt in pieces], 100)
    assert harness.sent_to == [0, 1]
    assert [len(intake.add) for intake in harness.sent] == [3, 1]

    generations.abandon(owner)

    assert sorted(zip(harness.sent_to[2:], (len(i.finish) for i in harness.sent[2:]), strict=True)) == [(0, 3), (1, 1)]
