"""Prompts per second through the queue: plain Celery against Millrace, with an engine that answers at once.

    make bench-queue                    or: python -m benchmarks.bench_queue [--prompts N] [--million N]

One machine, one Redis, the same prompts of 870 characters. Plain Celery (benchmarks/plain_celery.py) runs one prompt
per task and keeps the answers in its Redis result backend. Millrace runs the same from a JSONL file to Results in the
caller's hands: read and checked, into the ledger, message, lease, resolved parameters, tokenizer, engine socket,
commit, read back; with every commit flushed to the disk. Both answer with the same text; the null engine stands for the
model and the model's own tokenizer on both sides (benchmarks/null_engine.py), and what the bundled model's tokenizer
would add to each prompt is printed. Parameters are the defaults, so answers are draws that nobody may share; the runs
marked greedy look up and keep every answer too.

Round trips of single prompts through an idle worker are timed on both sides, with the same client. Then a million
Requests are submitted with no worker running, so that all their messages wait in Redis, and worked off.
Prints a table, then one JSON object as the last line.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from celery import Celery
from redis import Redis

from benchmarks.null_engine import ANSWER, write_null_model
from benchmarks.plain_celery import VARIANTS, prompts_per_second, round_trips, running_worker
from benchmarks.queue_servers import postgres
from producer.client import Client
from protocol.celery_app import interactive_queue, make_app
from protocol.requests import Request
from protocol.sampling import SamplingParams
from protocol.settings import EngineSettings, Settings
from storage.ledger import Ledger
from worker.local.redis_server import RedisServer
from worker.local.system import settings_environ
from worker.text import Tokenizer

ROOT = Path(__file__).parents[1]
PROMPT_CHARACTERS = 870
#: Requests after which memory should no longer grow.
SETTLED = 100_000
_WARM_UP = 2000
_NUM_ROUND_TRIPS = 500
_SAMPLE_S = 0.25


def make_prompts(num: int) -> Iterator[str]:
    """English words in any order, each prompt another one."""
    rng = random.Random(0)
    words = (ROOT / "docs" / "design.md").read_text().split()
    for i in range(num):
        yield f"{i} {' '.join(rng.choices(words, k=PROMPT_CHARACTERS // 4))}"[:PROMPT_CHARACTERS]


def write_prompts(path: Path, num: int) -> Path:
    with path.open("wb") as file:
        for prompt in make_prompts(num):
            file.write(msgspec.json.encode({"prompt": prompt}) + b"\n")
    return path


@contextlib.contextmanager
def running_millrace(settings: Settings, log: Path) -> Iterator[int]:
    """A worker with the null engine, entered once it answers; gives its pid."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    environ = {**plain, **settings_environ(settings)}
    with log.open("ab") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.null_engine"], env=environ, stdout=output, stderr=output
        )
    app = make_app(settings)
    try:
        while not app.control.ping(timeout=0.5):
            if worker.poll() is not None:
                raise RuntimeError(f"the worker did not start: see {log}")
        yield worker.pid
    finally:
        app.close()
        worker.terminate()
        worker.wait()


def run_job(settings: Settings, path: Path, params: SamplingParams) -> float:
    """Seconds from the file to the last Result read back."""
    started = time.perf_counter()
    with Client(settings) as client:
        job = client.submit(path, params=params)
        for result in client.results(job):
            assert result.answer is not None, result.failure
            assert result.answer.text == ANSWER
    return time.perf_counter() - started


def measure_millrace(settings: Settings, folder: Path, num: int) -> dict[str, float]:
    """Prompts per second, with the default parameters and greedy."""
    with contextlib.closing(Ledger(settings.database_url)) as ledger:
        ledger.migrate()
    prompts, few = write_prompts(folder / "prompts.jsonl", num), write_prompts(folder / "few.jsonl", _WARM_UP)
    rates = {}
    with running_millrace(settings, folder / "worker.log"):
        run_job(settings, few, SamplingParams())
        rates["default"] = num / run_job(settings, prompts, SamplingParams())
        rates["greedy"] = num / run_job(settings, prompts, SamplingParams(temperature=0))
    return rates


def measure_calls(settings: Settings, folder: Path) -> list[float]:
    """Seconds of round trips of `millrace.generate`, asked for by a Celery app that knows nothing of Millrace."""
    queue, prompts = interactive_queue(settings.served_model), list(make_prompts(_NUM_ROUND_TRIPS + 50))
    with running_millrace(settings, folder / "worker.log"):
        app = Celery("foreign", broker=settings.broker_url, backend=settings.broker_url, set_as_current=False)
        try:
            round_trips(app, prompts[:50], "millrace.generate", queue)
            return round_trips(app, prompts[50:], "millrace.generate", queue)
        finally:
            app.close()


class MemoryWatch:
    """Samples the resident memory of processes, and Redis' own account of its memory, until it is closed."""

    def __init__(self, pids: Sequence[int], redis: Redis) -> None:
        self.samples: list[tuple[float, list[int], int]] = []
        self._pids, self._redis = pids, redis
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def growth(self, settled_at: float) -> float:
        """Of the process that grew most, from that moment on to its highest: 0.05 is 5 %."""
        later: list[list[int]] = [each for at, each, _ in self.samples if at >= settled_at]
        growth: list[float] = [max(of_one) / of_one[0] - 1 for of_one in zip(*later, strict=True)]
        return max(growth)

    def _run(self) -> None:
        while not self._is_over.wait(_SAMPLE_S):
            used = int(self._redis.info("memory")["used_memory"])
            self.samples.append((time.perf_counter(), [_resident_bytes(pid) for pid in self._pids], used))


def measure_million(settings: Settings, folder: Path, num: int) -> dict[str, float]:
    """Submitting without a worker, then working it off: seconds, bytes in Redis, growth of memory."""
    with contextlib.closing(Ledger(settings.database_url)) as ledger:
        ledger.migrate()
    path = write_prompts(folder / "million.jsonl", num)
    redis = Redis.from_url(settings.broker_url)
    before = int(redis.info("memory")["used_memory"])
    settled = [0.0]

    def note(line: int) -> None:
        if line >= min(SETTLED, num // 2) and not settled[0]:
            settled[0] = time.perf_counter()

    watch = MemoryWatch([os.getpid()], redis)
    started = time.perf_counter()
    with Client(settings) as client:
        job = client.submit(path, on_progress=note)
        seconds = time.perf_counter() - started
        watch.close()
        peak = max(used for _, _, used in watch.samples)
        growth = watch.growth(settled[0])
        with running_millrace(settings, folder / "worker.log") as pid:
            watch = MemoryWatch([pid, os.getpid()], redis)
            settled[0], started = 0.0, time.perf_counter()
            for num_read, _ in enumerate(client.results(job), 1):
                note(num_read)
            watch.close()
            worked_off = num / (time.perf_counter() - started)
    growth_later = watch.growth(settled[0])
    return {
        "submit_s": seconds,
        "redis_bytes": (peak - before) / num,
        "producer_growth": growth,
        "worker_growth": growth_later,
        "worked_off_s": worked_off,
    }


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tokenizer_seconds(num: int = 500) -> float:
    """Of the bundled model, for each prompt."""
    tokenizer = Tokenizer(ROOT / "models" / "millrace-tiny")
    requests = [Request(line=i + 1, prompt=prompt) for i, prompt in enumerate(make_prompts(num))]
    started = time.process_time()
    tokenizer.encode(requests)
    return (time.process_time() - started) / num


def percentile_ms(seconds: Sequence[float], percent: int) -> float:
    return 1000 * statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1]


def measure_plain(url: str, folder: Path, num: int) -> tuple[float, list[float]]:
    """The best variant's prompts per second, and its round trips."""
    prompts = list(make_prompts(num))
    best, seconds = 0.0, [0.0, 0.0]
    for pool, concurrency in VARIANTS:
        Redis.from_url(url).flushall()
        with running_worker(url, pool, concurrency, folder / "plain.log") as app:
            prompts_per_second(app, prompts[: num // 20])
            rate = prompts_per_second(app, prompts)
            print(f"plain Celery, {pool} {concurrency}: {rate:.0f} prompts/s", flush=True)
            if rate > best:
                best, seconds = rate, round_trips(app, prompts[:_NUM_ROUND_TRIPS])
    return best, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain-prompts", type=int, default=5000)
    parser.add_argument("--prompts", type=int, default=200_000)
    parser.add_argument("--million", type=int, default=1_000_000, help="how many that is; 0 leaves it out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user
        redis = RedisServer(folder / "redis.log")
        redis.start()
        stack.callback(redis.stop)
        summary = run(arguments, folder, redis.url)
    print(json.dumps(summary))
    return 0


def run(arguments: argparse.Namespace, folder: Path, broker_url: str) -> dict[str, Any]:
    engine = EngineSettings(model=str(write_null_model(folder / "null")))
    base = Settings(broker_url=broker_url, engine=engine, log_level="WARNING")
    plain, plain_trips = measure_plain(broker_url, folder, arguments.plain_prompts)
    rates: dict[str, dict[str, float]] = {}
    with postgres(folder / "postgres") as postgres_url:
        for kind, url in (("sqlite", f"sqlite:///{folder}/ledger.db"), ("postgres", postgres_url)):
            Redis.from_url(broker_url).flushall()
            settings = msgspec.structs.replace(base, database_url=url)
            rates[kind] = measure_millrace(settings, folder, arguments.prompts)
            for params, rate in rates[kind].items():
                print(f"Millrace on {kind}, {params} parameters: {rate:.0f} prompts/s, {rate / plain:.1f}x", flush=True)
    print(f"the bundled model's tokenizer would add {tokenizer_seconds() * 1e6:.0f} us of CPU to each prompt")
    summary: dict[str, Any] = {"plain_prompts_s": round(plain)}
    summary |= {f"{kind}_prompts_s": round(rate["default"]) for kind, rate in rates.items()}
    summary |= {f"{kind}_greedy_prompts_s": round(rate["greedy"]) for kind, rate in rates.items()}
    summary |= {f"{kind}_ratio": round(rate["default"] / plain, 2) for kind, rate in rates.items()}
    calls = measure_calls(msgspec.structs.replace(base, database_url=f"sqlite:///{folder}/ledger.db"), folder)
    for percent in (50, 99):
        of_plain, of_calls = percentile_ms(plain_trips, percent), percentile_ms(calls, percent)
        print(
            f"round trip, P{percent}: plain Celery {of_plain:.2f} ms, millrace.generate {of_calls:.2f} ms", flush=True
        )
        summary[f"call_p{percent}_ratio"] = round(of_calls / of_plain, 2)
    if arguments.million:
        Redis.from_url(broker_url).flushall()
        settings = msgspec.structs.replace(base, database_url=f"sqlite:///{folder}/million.db")
        million = measure_million(settings, folder, arguments.million)
        print(
            f"{arguments.million} Requests: submitted in {million['submit_s']:.1f} s, {million['redis_bytes']:.1f} "
            f"bytes of Redis each, worked off at {million['worked_off_s']:.0f}/s; resident memory grew by "
            f"{million['producer_growth']:.1%} in the producer, {million['worker_growth']:.1%} in worker and reader"
        )
        summary["redis_bytes_per_request"] = round(million["redis_bytes"], 2)
        summary["submit_1m_s"] = round(million["submit_s"], 1)
        summary["rss_growth"] = round(max(million["producer_growth"], million["worker_growth"]), 4)
    summary["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    return summary


if __name__ == "__main__":
    sys.exit(main())
