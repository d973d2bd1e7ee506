"""An input of 500 lines with everything in it, and the check that a file of Results has every line of it once."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUM_LINES = 500
NUM_DUPLICATES = 50
#: Far more than the 512 tokens the test model holds.
LONG_TEXT = "the worker pulls " * 400


@dataclass
class MixedJob:
    """What was written, by line number from 1."""

    path: Path
    num_samples: dict[int, int] = field(default_factory=dict)
    custom_ids: dict[int, str | None] = field(default_factory=dict)
    malformed: dict[int, str] = field(default_factory=dict)  # error codes
    too_long: set[int] = field(default_factory=set)
    duplicates: dict[int, int] = field(default_factory=dict)  # of an earlier line

    def check(self, output: Path) -> list[dict[str, Any]]:
        """Every line once, with its samples, in order, answers and errors where they belong; returns the rows."""
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        expected = [
            (line, sample) for line in range(1, NUM_LINES + 1) for sample in range(self.num_samples.get(line, 1))
        ]
        assert [(row["line"], row["sample"]) for row in rows] == expected
        assert {row["line"]: row["custom_id"] for row in rows} == self.custom_ids
        codes = {row["line"]: row["error"]["code"] for row in rows if row["error"]}
        assert codes == self.malformed | dict.fromkeys(self.too_long, "prompt_too_long")
        first = {row["line"]: row for row in rows if row["sample"] == 0}
        for twins in self.duplicates.items():
            one, other = (first[line] for line in twins)
            # Two workers may compute both at the same time, and rounding is not the same in every batch.
            if one["cached"] or other["cached"]:
                assert (one["text"], one["usage"]) == (other["text"], other["usage"])
        return rows


def write_mixed_job(path: Path) -> MixedJob:
    """442 different prompts in four shapes, 50 duplicates, 5 malformed lines and 3 prompts that can never fit."""
    job = MixedJob(path)
    malformed = {
        17: ("nonsense", "invalid_json"),
        120: ('{"prompt": 5}', "invalid_type"),
        233: ('{"prompt": "a", "max_token": 5}', "unknown_field"),
        341: ('{"prompt": "a", "temperature": 9}', "invalid_parameter"),
        480: ('{"url": "/v1/images/generations", "body": {"prompt": "a"}}', "unsupported_url"),
    }
    written: dict[int, dict[str, Any]] = {}
    with path.open("w") as file:
        for line, fields in enumerate(_different(), start=1):
            original = line - 250
            if line in malformed:
                text, job.malformed[line] = malformed[line]
                job.custom_ids[line] = None
                file.write(text + "\n")
                continue
            if line in (50, 250, 450):
                fields = {"id": f"long {line}", "prompt": LONG_TEXT}
                job.too_long.add(line)
            elif len(job.duplicates) < NUM_DUPLICATES and original in written and job.num_samples.get(original, 1) == 1:
                job.duplicates[line] = original
                fields = written[original] | {_id_field(written[original]): f"duplicate {line}"}
            else:
                written[line] = fields
                job.num_samples[line] = fields.get("n", 1)
            job.custom_ids[line] = fields[_id_field(fields)]
            file.write(json.dumps(fields) + "\n")
    assert (len(job.duplicates), len(job.malformed), len(job.too_long)) == (NUM_DUPLICATES, 5, 3)
    return job


def _id_field(fields: dict[str, Any]) -> str:
    return "id" if "id" in fields else "custom_id"


def _different() -> Iterator[dict[str, Any]]:
    for number in range(1, NUM_LINES + 1):
        text = f"the queue holds prompt {number} and the worker " + "pulls " * (number % 20)
        messages = [{"role": "user", "content": text}]
        if number % 10 == 0:
            yield {"id": f"two {number}", "prompt": text, "n": 2, "temperature": 0.8, "seed": number}
        elif number % 4 == 0:
            yield {"id": f"plain {number}", "prompt": text}
        elif number % 4 == 1:
            yield {"custom_id": f"messages {number}", "messages": messages}
        else:
            url = "/v1/completions" if number % 4 == 2 else "/v1/chat/completions"
            content = {"prompt": text} if number % 4 == 2 else {"messages": messages}
            yield {"custom_id": f"batch {number}", "method": "POST", "url": url, "body": content | {"model": "tiny"}}
