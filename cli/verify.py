"""`millrace verify`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.counted import counted

if TYPE_CHECKING:
    from producer.file_check import FileCheck
    from storage.completeness import Proof, Verification


@click.command("verify", short_help="Prove that a finished Job is complete.")
@click.argument("job")
@click.argument("files", metavar="[FILE]...", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(job: str, files: tuple[Path, ...], as_json: bool) -> None:
    """Read all Results of a finished Job again and compare them with the counts and the digest it was closed with.

    With FILE, as `millrace results` wrote it, in either format, also that it holds every Result, once and unaltered;
    where errors are in a file of their own, both files together. FILE is JSON lines, CSV or Parquet, in gzip or zstd or
    not, by its suffixes. The exit code is 1 when anything is missing or differs.

    \b
    Example:
      millrace verify 3f9a results.jsonl
    """
    import msgspec

    from producer.client import Client
    from producer.file_check import check_files
    from protocol.errors import ConfigurationError

    with Client() as client:
        found = client.find(job)
        if found.state != "finished":
            raise ConfigurationError(f"the Job {found.id} is {found.state}: only a finished one can be verified")
        verification = client.verify(found)
        checked = check_files(files, client.results(found, wait=False), found) if files else None
    holds = verification.holds and (checked is None or checked.holds)
    if as_json:
        report: dict[str, Any] = {"id": found.id, "holds": holds, **msgspec.to_builtins(verification)}
        if checked is not None:
            report["file"] = msgspec.to_builtins(checked)
        click.echo(msgspec.json.encode(report))
    else:
        for line in [
            *_ledger_lines(verification),
            *([] if checked is None else _file_lines(", ".join(map(str, files)), checked)),
        ]:
            click.echo(line)
    if not holds:
        raise click.exceptions.Exit(1)


def _ledger_lines(verification: "Verification") -> list[str]:
    found, stated = verification.found, verification.stated
    assert stated is not None
    lines = [
        f"lines    {found.num_lines:,}",
        f"results  {found.num_results:,}, of them {_parts(found)}",
        f"digest   {found.digest}",
    ]
    if verification.num_incomplete:
        lines.append(
            f"INCOMPLETE: without a result {counted(verification.num_incomplete, 'request')}: "
            + _shown(verification.incomplete)
        )
    for first, last in verification.altered:
        lines.append(f"ALTERED: the results of lines {first:,} to {last:,} are not those that were committed")
    if stated != found:
        lines.append(
            f"DIFFERENT: the job was closed with {counted(stated.num_results, 'result')}, of them {_parts(stated)}, "
            f"and the digest {stated.digest}"
        )
    return lines if len(lines) > 3 else [*lines, "complete: as the job was closed"]


def _parts(totals: "Proof") -> str:
    return f"{counted(totals.num_errors, 'error')} and {totals.num_cached:,} known already"


def _file_lines(name: str, checked: "FileCheck") -> list[str]:
    rows = counted(checked.num_rows, "line" if checked.format == "openai" else "result")
    if checked.holds:
        return [f"{name}: all {rows}, each once and unaltered"]
    parts = f"{checked.num_missing:,} missing, {checked.num_altered:,} altered, {checked.num_surplus:,} too many"
    return [f"{name}: {rows}, {parts}: {_shown(checked.lines)}"]


def _shown(lines: list[int]) -> str:
    return "line" + "s" * (len(lines) != 1) + " " + ", ".join(map(str, lines))
