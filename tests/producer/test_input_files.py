"""Files as they come: every format and compression, and everything that is wrong with files."""

import contextlib
import csv
import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from producer.client import Client
from producer.columns import Columns
from producer.file_format import FORMATS, FileFormat, format_of
from producer.lines import LineReader
from producer.parquet_rows import ParquetRows
from producer.raw_lines import MAX_LINE_BYTES
from producer.source import AS_NAMED, Input, Reading, Source
from protocol.errors import ConfigurationError, DamagedInput
from protocol.requests import Kind, Request, Result
from protocol.settings import Settings
from storage.leases import claim_next
from storage.ledger import Ledger

TEXTS = ["plain", 'with "quotes", commas', "two\nlines", "Grüße 🐟", " ", "=1+1"]
IDS = ["a", "a", "b,c", "", "é", "7"]  # twice the same: the line is what tells them apart


def jsonl_bytes() -> bytes:
    items = [{"prompt": text} | ({"custom_id": name} if name else {}) for text, name in zip(TEXTS, IDS, strict=True)]
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def csv_bytes() -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["number", "id", "prompt", "temperature"])
    for number, (prompt, name) in enumerate(zip(TEXTS, IDS, strict=True)):
        writer.writerow([number, name, prompt, "0.5"])
    return text.getvalue().encode()


def parquet_bytes(prompts: Any = None, ids: Any = None) -> bytes:
    sink = io.BytesIO()
    ids = [name or None for name in IDS] if ids is None else ids
    table = pa.table({"temperature": [0.5] * len(ids), "prompt": TEXTS if prompts is None else prompts, "id": ids})
    pq.write_table(table, sink, row_group_size=4)
    return sink.getvalue()


WRITERS: dict[str, Callable[[], bytes]] = {"jsonl": jsonl_bytes, "csv": csv_bytes, "parquet": parquet_bytes}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.compress(data[:50]) + zstandard.compress(data[50:]),  # a file of two frames
}
TABLE = Reading(columns=Columns(id="id"))


def read(given: Input, reading: Reading = AS_NAMED, *, skip: int = 0) -> list[Request | Result]:
    with Source(given, reading).lines() as lines:
        return list(LineReader(lines, ["tiny"], skip=skip))


def code_of(item: Request | Result) -> str | None:
    return None if isinstance(item, Request) or item.failure is None else item.failure.code


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "csv.zst", "parquet"])
def test_every_format_has_the_same_requests_from_a_file_and_from_a_stream(suffix: str, tmp_path: Path) -> None:
    kind, dot, compression = suffix.partition(".")
    path = tmp_path / f"prompts.{suffix}"
    path.write_bytes(PACKERS[dot + compression](WRITERS[kind]()))
    columns = Columns() if kind == "jsonl" else Columns(id="id")
    expected = [
        Request(line=number, prompt=text, custom_id=name or None)
        for number, (text, name) in enumerate(zip(TEXTS, IDS, strict=True), 1)
    ]

    assert read(path, Reading(columns=columns)) == expected
    assert read(path, Reading(columns=columns), skip=4) == expected[4:]
    with _pipe(path.read_bytes()) as stream:
        assert read(stream, Reading(format_of(suffix), columns)) == expected


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("generate", lambda text: {"prompt": text}),
        ("score", lambda text: {"kind": "score", "text": text}),
        ("embed", lambda text: {"input": text}),
        ("classify", lambda text: {"kind": "classify", "input": text}),
    ],
)
def test_rows_of_a_table_ask_for_any_kind(kind: Kind, fields: Callable[[str], Any], tmp_path: Path) -> None:
    expected = read([fields(text) | ({"id": name} if name else {}) for text, name in zip(TEXTS, IDS, strict=True)])
    digests = set()
    for suffix in ("csv", "parquet"):
        path = tmp_path / f"texts.{suffix}"
        path.write_bytes(WRITERS[suffix]())
        reading = Reading(columns=Columns(id="id", kind=kind))

        assert read(path, reading) == expected
        digests |= {Source(path, reading).digest(), Source(path, TABLE).digest()}
    assert len(digests) == (2 if kind == "generate" else 4)


def _pipe(data: bytes) -> io.BufferedReader:
    """As stdin is: not seekable."""
    reader, writer = os.pipe()
    assert len(data) < 65536, "a pipe holds no more without a reader"
    os.write(writer, data)
    os.close(writer)
    return os.fdopen(reader, "rb")


def test_a_name_tells_the_format_and_what_it_does_not_tell_is_json_lines() -> None:
    assert format_of("out/A.NDJSON.GZ") == FileFormat("jsonl", "gzip")
    assert format_of("csv.zst") == FileFormat("csv", "zstd")
    assert format_of("prompts.txt") == format_of("prompts") == FileFormat("jsonl")
    with pytest.raises(ConfigurationError, match="compresses its own columns"):
        format_of("a.parquet.gz")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.csv.gz", "a.csv.zst"])
def test_an_empty_file_has_no_lines(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    Source(tmp_path / name).check()
    assert read(tmp_path / name) == []


def test_byte_order_mark_and_windows_line_ends_change_nothing() -> None:
    rows = b'\xef\xbb\xbfprompt,id\r\n"a\r\nb",1\r\n\r\nc,2\r\n'
    as_csv = Reading(FileFormat("csv"), Columns(id="id"))
    expected = [
        Request(line=1, prompt="a\r\nb", custom_id="1"),
        Request(line=3, prompt="c", custom_id="2"),  # a blank row counts, as a blank line does
    ]
    assert read(io.BytesIO(rows), as_csv) == expected
    assert read(io.BytesIO(gzip.compress(rows)), Reading(FileFormat("csv", "gzip"), Columns(id="id"))) == expected


def test_a_row_that_is_not_well_formed_fails_alone() -> None:
    rows = b'prompt,id\nfine,1\nbad \xff,2\nlone,3,surplus\nshort\n"a"b,4\nlast,5\n"never closed,6\nx,7\n'
    items = read(io.BytesIO(rows), Reading(FileFormat("csv"), Columns(id="id")))

    assert [(item.line, code_of(item)) for item in items] == [
        (1, None),
        (2, "invalid_utf8"),
        (3, "invalid_csv"),
        (4, "invalid_csv"),
        (5, "invalid_csv"),
        (6, None),
        (7, "invalid_csv"),
    ]
    assert items[5] == Request(line=6, prompt="last", custom_id="5")


class Watched(io.BytesIO):
    """Remembers the most that was taken from it at once."""

    most = 0

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        self.most = max(self.most, len(line))
        return line


@pytest.mark.parametrize(
    ("file_format", "before", "after"),
    [
        (FileFormat(), b'{"prompt": "', b'"}\n{"prompt": "b"}\n'),
        (FileFormat("csv"), b"prompt\n", b"\nb\n"),
        (FileFormat("csv"), b'prompt\n"', b'\n\n\n"\nb\n'),
    ],
)
def test_a_line_of_100_mb_is_refused_without_being_held(file_format: FileFormat, before: bytes, after: bytes) -> None:
    file = Watched(before + b"x" * 100_000_000 + after)

    refused, next_one = read(file, Reading(file_format))

    assert code_of(refused) == "line_too_long"
    assert next_one == Request(line=2, prompt="b")
    assert file.most == MAX_LINE_BYTES + 1


def test_a_long_value_in_parquet_is_refused_and_a_null_is_missing() -> None:
    data = parquet_bytes(["x" * (MAX_LINE_BYTES + 1), None, "c"], [1, 2, None])

    first, second, third = read(io.BytesIO(data), Reading(FileFormat("parquet"), Columns(id="id")))

    assert code_of(first) == "line_too_long"
    assert (code_of(second), second.custom_id) == ("missing_field", "2")
    assert third == Request(line=3, prompt="c")


def test_invalid_utf8_in_parquet_fails_alone() -> None:
    bad = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    items = read(io.BytesIO(parquet_bytes(bad, ["1", "2", "3"])), Reading(FileFormat("parquet")))

    assert [code_of(item) for item in items] == [None, "invalid_utf8", None]


def test_parquet_texts_of_every_type_are_read() -> None:
    for type_ in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        data = parquet_bytes(pa.array(["a", "b"]).cast(type_), [1, 2])
        items = read(io.BytesIO(data), Reading(FileFormat("parquet"), Columns(id="id")))
        assert items == [Request(line=n, prompt=p, custom_id=str(n)) for n, p in ((1, "a"), (2, "b"))]


@pytest.mark.parametrize(
    ("name", "data", "columns", "words"),
    [
        ("a.csv", b"question,id\nx,1\n", Columns(), "no column 'prompt' for the prompt: --prompt-column takes one of"),
        ("a.csv", b"question,id\nx,1\n", Columns(), "'question', 'id'"),
        ("a.csv", b"prompt,prompt\nx,1\n", Columns(), "2 columns are named 'prompt'"),
        ("a.csv", b"prompt\nx\n", Columns(id="key"), "no column 'key' for the id: --id-column takes one of 'prompt'"),
        ("a.csv", b'"prompt\nx\n', Columns(), "the first row, which names the columns, cannot be read"),
        ("a.parquet", parquet_bytes(), Columns("question"), "takes one of 'temperature', 'prompt', 'id'"),
        ("a.parquet", parquet_bytes(), Columns("temperature"), "'temperature' is of type double: it must be text"),
        ("a.parquet", b"", Columns(), "no whole Parquet file"),
        ("a.parquet", parquet_bytes()[:-10], Columns(), "no whole Parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_anything_is_made_of_it(
    name: str, data: bytes, columns: Columns, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)

    with pytest.raises(ConfigurationError) as raised:
        Source(tmp_path / name, Reading(columns=columns)).check()

    assert words in str(raised.value)
    assert str(tmp_path / name) in str(raised.value)


def test_columns_of_json_lines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="which have no columns"):
        Source(tmp_path / "a.jsonl", TABLE)


def test_other_columns_make_another_input_and_another_name_does_not(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_bytes(csv_bytes())
    digests = [
        Source(tmp_path / name, Reading(columns=columns)).digest()
        for name, columns in (("a.csv", Columns()), ("b.csv", Columns()), ("a.csv", Columns(id="id")))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_without_pyarrow_parquet_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)

    with pytest.raises(ConfigurationError, match=r"pip install '.\[parquet\]'"):
        ParquetRows(io.BytesIO(), Columns())


@pytest.fixture
def client(ledger: Ledger, database_url: str, redis_url: str) -> Iterator[Client]:
    settings = Settings(database_url=database_url, broker_url=redis_url, model_name="tiny")
    with Client(settings) as client:
        yield client


def _incompressible_lines(number: int) -> bytes:
    return b"".join(b'{"prompt": "%s"}\n' % os.urandom(500).hex().encode() for _ in range(number))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_comes_before_a_break_stands_and_the_repaired_file_goes_on_with_it(
    suffix: str, client: Client, ledger: Ledger, tmp_path: Path
) -> None:
    path = tmp_path / f"prompts.jsonl{suffix}"
    lines = _incompressible_lines(400)
    whole = gzip.compress(lines) if suffix == ".gz" else zstandard.compress(lines)
    path.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(DamagedInput) as raised:
        client.submit(path)

    (job,) = client.jobs()
    position = client.status(job).num_lines
    assert 100 < position < 300
    assert job.state == "submitting"
    message = str(raised.value)
    assert f"{path} breaks off after line {position}, at byte " in message
    assert f"the lines up to {position} are in the Job {job.id} and get their answers" in message
    assert f"begins with the same lines, the same command with --job {job.id} goes on behind them" in message
    lease = claim_next(ledger, ["tiny"], "worker", 60, min_age_s=0)
    assert lease is not None, "what stands is worked on"

    path.write_bytes(whole)
    again = client.submit(path, name=job.id)

    assert (again.id, again.state, again.num_lines) == (job.id, "running", 400)
    assert client.status(again).num_requests == 400


@pytest.mark.parametrize(("name", "kind"), [("a.jsonl.gz", "gzip"), ("a.jsonl.zst", "zstd")])
def test_a_file_that_is_not_what_its_name_says_is_named_before_anything_is_made(
    name: str, kind: str, client: Client, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(jsonl_bytes())

    with pytest.raises(DamagedInput, match=f"{name} is damaged in its first line.*as {kind} is read: write it anew"):
        client.submit(tmp_path / name)

    assert client.jobs() == []


def test_a_damaged_page_of_parquet_is_named_with_what_came_before_it(tmp_path: Path) -> None:
    table = pa.table({"prompt": [os.urandom(50).hex() for _ in range(4_000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2_000, compression="zstd", use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = len(content) * 9 // 16
    content[middle : middle + 20_000] = b"\xff" * 20_000
    (tmp_path / "a.parquet").write_bytes(content)

    with pytest.raises(DamagedInput, match=r"a\.parquet is damaged after line \d+, at byte \d+.*as parquet is read"):
        read(tmp_path / "a.parquet")


def test_damage_within_is_told_from_a_break(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    data = bytearray(gzip.compress(b"prompt\n" + os.urandom(30_000).hex().encode() + b"\nb\n"))
    data[-6] ^= 0xFF  # of the checksum
    path.write_bytes(data)

    with pytest.raises(DamagedInput, match=r"a\.csv\.gz is damaged after line 2"):
        read(path)


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2)))
def test_any_rows_come_back_from_csv(rows: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["prompt", "id"], *rows])

    items = read(io.BytesIO(text.getvalue().encode()), Reading(FileFormat("csv"), Columns(id="id")))

    # An id may be too long or blank; prompts are as they were.
    assert [item.prompt for item in items if isinstance(item, Request)] == [prompt for prompt, _ in rows]


@given(st.binary(max_size=200), st.sampled_from(FORMATS))
def test_any_bytes_are_lines_or_one_clear_error(content: bytes, name: str) -> None:
    file_format = format_of(name)
    head = b"prompt\n" if file_format == FileFormat("csv") else b""
    may_be_damaged = file_format.compression is not None or file_format.kind == "parquet"
    with contextlib.suppress(*[ConfigurationError, DamagedInput] * may_be_damaged):
        items = read(io.BytesIO(head + content), Reading(file_format))
        assert all(isinstance(item, Request) or item.failure is not None for item in items)
