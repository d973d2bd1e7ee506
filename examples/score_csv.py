"""Say how likely a model finds each text of a CSV file: the same rows again, with two columns more.

It speaks to whatever system the MILLRACE_* variables or a millrace.toml name; a worker must be running there:
    python examples/score_csv.py reviews.csv --column text -o scored.csv
Stopped halfway, the same command goes on; with nothing changed, it computes nothing.
"""

import argparse
import csv
import sys

from producer import Client
from protocol.scores import unpack_score


def lines(path: str, column: str):
    """What to ask of each row: how likely its text is. Read as a stream: the file may be of any size."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            yield {"kind": "score", "text": row[column]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="CSV")
    parser.add_argument("--column", default="text", help="the column of texts; default text")
    parser.add_argument("-o", "--output", required=True, metavar="CSV")
    options = parser.parse_args()
    with open(options.input, newline="", encoding="utf-8-sig") as file:
        columns = csv.DictReader(file).fieldnames or []
    if options.column not in columns:
        parser.error(f"{options.input} has no column {options.column!r}: --column takes one of {', '.join(columns)}")

    with Client() as client:
        # An iterator is read only once, so its Job needs a name to be found again.
        job = client.submit(lines(options.input, options.column), name=f"score {options.input} {options.column}")
        client.wait(job, on_progress=lambda status: print(f"{status.num_ok + status.num_error:,}", file=sys.stderr))
        with (
            open(options.input, newline="", encoding="utf-8-sig") as source,
            open(options.output, "w", newline="", encoding="utf-8") as target,
        ):
            rows = csv.DictReader(source)
            writer = csv.writer(target)
            writer.writerow([*rows.fieldnames, "perplexity", "error"])
            # One Result for each row, in the order of the rows.
            for row, result in zip(rows, client.results(job), strict=True):
                score = unpack_score(result.answer.score) if result.answer else None
                perplexity = "" if score is None else f"{score.perplexity:.4f}"
                writer.writerow([*row.values(), perplexity, result.failure.code if result.failure else ""])
    print(f"{options.output}: Job {job.id}")


if __name__ == "__main__":
    main()
