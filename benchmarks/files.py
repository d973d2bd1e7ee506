"""Lines per second and memory of reading inputs and writing results, without a queue, a database or a model.

    python -m benchmarks.files [--lines 1000000] [--formats jsonl,jsonl.gz,csv,parquet]

For each format a file of that many prompts is made, then read as a Job's input is, line by line as checked Requests;
and as many Results are written as `millrace results` writes them. Each pass runs in a process of its own. Growth is
that of resident memory as Linux has it, sampled a hundred times, over what it was after the first hundredth. Files go
to a temporary folder. Prints a table, then one JSON object as the last line.
"""

import argparse
import csv
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from producer.columns import Columns
from producer.compression import compressed
from producer.file_format import FORMATS, format_of
from producer.lines import LineReader
from producer.parquet_rows import import_pyarrow
from producer.results_file import ResultsFile, ResultShape
from producer.source import Reading, Source
from protocol.requests import Answer, Request, Result
from protocol.sampling import SamplingParams, resolve
from storage.jobs import Job

JOB = Job("0123456789abcdef", "default", "x", "tiny", SamplingParams(), "finished", 1_700_000_000.0, None)
PARAMS = resolve(SamplingParams(temperature=0), max_tokens=64)
TEXT = "Write down in three sentences, with numbers where there are any, what happened in the year {}, and why."
_PARQUET_ROWS = 50_000


class Memory:
    """Resident memory, sampled while lines go by."""

    def __init__(self, num_lines: int) -> None:
        self._every = max(num_lines // 100, 1)
        self._first = self._most = 0

    def look(self, number: int) -> None:
        if number % self._every == 0:
            size = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self._first = self._first or size
            self._most = max(self._most, size)

    def figures(self) -> dict[str, float]:
        return {"growth_mib": (self._most - self._first) / (1 << 20), "peak_mib": self._most / (1 << 20)}


def make_input(path: Path, num_lines: int) -> None:
    file_format = format_of(path.name)
    rows = ((f"request-{number}", TEXT.format(number)) for number in range(num_lines))
    if file_format.kind == "parquet":
        _make_parquet(path, rows)
        return
    with path.open("wb") as raw, compressed(raw, file_format.compression) as file:
        if file_format.kind == "csv":
            import io

            with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
                writer = csv.writer(text)
                writer.writerow(["id", "prompt"])
                writer.writerows(rows)
            return
        for custom_id, text_ in rows:
            file.write(json.dumps({"custom_id": custom_id, "prompt": text_, "max_tokens": 64}).encode() + b"\n")


def _make_parquet(path: Path, rows: Iterator[tuple[str, str]]) -> None:
    from itertools import islice

    arrow = import_pyarrow()
    schema = arrow.schema([("id", arrow.string()), ("prompt", arrow.string())])
    with arrow.parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, _PARQUET_ROWS)):
            columns = [list(column) for column in zip(*group, strict=True)]
            writer.write_batch(arrow.record_batch(columns, schema=schema))


def read(path: Path, num_lines: int) -> dict[str, float]:
    memory = Memory(num_lines)
    is_table = format_of(path.name).kind != "jsonl"
    started, num_read = time.perf_counter(), 0
    with Source(path, Reading(columns=Columns(id="id") if is_table else Columns())).lines() as lines:
        for item in LineReader(lines, ["tiny"]):
            assert isinstance(item, Request)
            num_read += 1
            memory.look(num_read)
    assert num_read == num_lines
    return {"lines_s": num_lines / (time.perf_counter() - started), **memory.figures()}


def write(path: Path, num_lines: int) -> dict[str, float]:
    memory = Memory(num_lines)
    answer = Answer(text=TEXT * 2, finish_reason="stop", prompt_tokens=24, completion_tokens=48)
    shape = ResultShape("openai" if path.name.startswith("openai") else "flat", JOB)
    started = time.perf_counter()
    with ResultsFile(path, shape) as file:
        for number in range(1, num_lines + 1):
            file.write(Result(line=number, custom_id=f"request-{number}", answer=answer, params=PARAMS))
            memory.look(number)
    return {"lines_s": num_lines / (time.perf_counter() - started), **memory.figures()}


def apart(work: Callable[[Path, int], Any], path: Path, num_lines: int) -> Any:
    """In a process of its own, whose memory is nobody else's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, path, num_lines).result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--formats", default="jsonl,jsonl.gz,jsonl.zst,csv,parquet", help=f"of {', '.join(FORMATS)}")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    for name in arguments.formats.split(","):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"input.{name}"
            apart(make_input, source, arguments.lines)
            rows[f"read {name}"] = apart(read, source, arguments.lines)
            rows[f"write {name}"] = apart(write, Path(folder) / f"results.{name}", arguments.lines)
            if name == "jsonl":
                rows["write jsonl, openai"] = apart(write, Path(folder) / "openai.jsonl", arguments.lines)
        for what in [row for row in rows if row.split(",")[0].endswith(f" {name}")]:
            row = rows[what]
            memory = f"{row['growth_mib']:>7.1f} MiB more, at most {row['peak_mib']:>6.1f} MiB"
            print(f"{what:<20} {row['lines_s']:>9,.0f} lines/s {memory}", flush=True)
    rounded = {what: {key: round(value, 1) for key, value in row.items()} for what, row in rows.items()}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps({"lines": arguments.lines, "rows": rounded, "machine": machine}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
