"""The committer over a real ledger and a real Redis."""

import queue
from typing import Any

import redis

from protocol.requests import Answer, Result
from storage.answers import AnswerCache
from storage.landing_channel import LandingChannel, channel
from storage.ledger import Ledger
from storage.results import read_results
from tests.storage.samples import new_chunk, new_job, new_lease
from worker.committer import Committer
from worker.open_chunk import OpenChunk


def test_word_of_new_results_is_sent_once_they_can_be_read(ledger: Ledger, redis_url: str) -> None:
    job = new_job(ledger)
    landings = LandingChannel.connect(redis_url)
    finished: queue.SimpleQueue[OpenChunk] = queue.SimpleQueue()
    committer = Committer(
        ledger,
        AnswerCache.connect(redis_url, 60, 1 << 20),
        landings,
        on_committed=lambda keys: None,
        on_finished=finished.put,
        on_lost=finished.put,
    )
    chunk = OpenChunk(new_lease(ledger, new_chunk(ledger, job, [1])), None, committer)
    chunk.expect(1)
    with redis.Redis.from_url(redis_url) as server, server.pubsub() as listener:
        listener.subscribe(channel(job.id))
        committer.start()
        answer = Answer(text="yes", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
        chunk.settle(Result(line=1, answer=answer))
        word: Any = next(message for message in listener.listen() if message["type"] == "message")
        assert word["data"] == b"%d" % chunk.lease.chunk_id
        assert [result.line for result in read_results(ledger, job.id)] == [1]
        finished.get(timeout=60)
    committer.stop()
    landings.close()
