"""From a compressed table to another one, and errors apart as they finish, with the real worker."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import Start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

NUM_ROWS = 40
BAD_ROW = 17


def test_a_table_is_answered_into_a_table_and_into_openais_batch_output(
    start: Start, model: Path, tmp_path: Path
) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["number", "question"])
    for number in range(1, NUM_ROWS + 1):
        writer.writerow([number, f'the "queue",\nholds {number}', *["surplus"] * (number == BAD_ROW)])
    (tmp_path / "prompts.csv.gz").write_bytes(gzip.compress(text.getvalue().encode()))
    run = ["run", "prompts.csv.gz", "--prompt-column", "question", "--id-column", "number", "--model", model]
    run += ["--temperature", "0", "--max-tokens", "8"]

    code, _, stderr = start(
        *run, "-o", "out.jsonl", "--errors", "errors.jsonl", "--format", "openai", "--order", "finished"
    ).finish()
    assert code == 0, stderr
    code, stdout, stderr = start(*run, "-o", "out.parquet").finish()
    assert code == 0, stderr
    assert "nothing was computed" in stdout

    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    (error,) = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert error["response"]["body"]["error"]["code"] == "invalid_csv"
    texts = {int(line["custom_id"]): line["response"]["body"]["choices"][0]["text"] for line in answers}
    assert {line["response"]["body"]["model"] for line in answers} == {"tiny"}
    assert sorted(texts) == [number for number in range(1, NUM_ROWS + 1) if number != BAD_ROW]
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["line"] for row in rows] == list(range(1, NUM_ROWS + 1))
    assert {row["line"]: row["text"] for row in rows if row["error_code"] is None} == texts
    assert rows[BAD_ROW - 1]["error_code"] == "invalid_csv"
