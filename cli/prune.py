"""`millrace prune`."""

from typing import TYPE_CHECKING

import click

from cli.counted import counted
from cli.duration import Duration

if TYPE_CHECKING:
    from storage.answers import AnswerCache
    from storage.ledger import Ledger
    from storage.retention import AnswerTotals


@click.command("prune", short_help="Delete old Jobs, and answers nobody uses.")
@click.option("--older-than", "age_s", type=Duration(), metavar="AGE", help="Delete Jobs that ended longer ago.")
@click.option(
    "--answers-older-than", "unused_s", type=Duration(), metavar="AGE",
    help="Forget answers that nobody asked for since, whosever they are.",
)  # fmt: skip
@click.option("--all-tenants", is_flag=True, help="The Jobs of all tenants, not only of the one that is set.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(age_s: float | None, unused_s: float | None, all_tenants: bool, dry_run: bool, as_json: bool) -> None:
    """Delete Jobs that ended long ago, with their Requests and Results, and answers that nobody uses any more.

    AGE is a number and its unit, one of s, m, h, d and w. Jobs that have not ended stay, whatever their age. Goes in
    small steps beside whatever else is running; stopped half-way, the same command goes on. A use of an answer is
    written down once a day at most, and a copy in Redis is used without a note for as long as it is kept there.

    \b
    Example:
      millrace prune --older-than 30d --answers-older-than 90d --dry-run
    """
    import msgspec

    from protocol.settings import load_settings
    from storage.answers import AnswerCache
    from storage.ledger import Ledger

    if age_s is None and unused_s is None:
        raise click.UsageError("say what may go: --older-than AGE for Jobs, --answers-older-than AGE for answers")
    settings = load_settings()
    ledger = Ledger(settings.database_url)
    cache = AnswerCache.connect(settings.broker_url, settings.answers_ttl_seconds, settings.answers_max_bytes)
    try:
        ledger.check_schema()
        tenant = None if all_tenants else settings.tenant
        num_jobs, num_results = (0, 0) if age_s is None else _prune_jobs(ledger, age_s, tenant, dry_run)
        answers = None if unused_s is None else _prune_answers(ledger, cache, unused_s, dry_run)
        is_sqlite = ledger.url.get_backend_name() == "sqlite"
    finally:
        ledger.close()
        cache.close()
    if as_json:
        fields = {"is_dry_run": dry_run, "num_jobs": num_jobs, "num_results": num_results}
        fields |= {"num_answers": 0 if answers is None else answers.num_answers}
        click.echo(msgspec.json.encode(fields | {"answer_bytes": 0 if answers is None else answers.num_bytes}))
        return
    verb = "would delete" if dry_run else "deleted"
    if age_s is not None:
        click.echo(f"{verb} {counted(num_jobs, 'Job')} with {counted(num_results, 'result')}")
    if answers is not None:
        click.echo(f"{verb} {_shown(answers)}")
    if is_sqlite and not dry_run and (num_jobs or (answers is not None and answers.num_answers)):
        click.echo("the database's file keeps its size: what became free in it is used again")


def _prune_jobs(ledger: "Ledger", age_s: float, tenant: str | None, dry_run: bool) -> tuple[int, int]:
    from cli.live_line import LiveLine
    from storage.deletion import count_ended_jobs, delete_ended_jobs

    if dry_run:
        return count_ended_jobs(ledger, age_s, tenant)
    with LiveLine() as line:
        return delete_ended_jobs(
            ledger,
            age_s,
            tenant,
            lambda jobs, results: line.show(lambda: f"{jobs:,} Jobs and {results:,} results deleted"),
        )


def _prune_answers(ledger: "Ledger", cache: "AnswerCache", unused_s: float, dry_run: bool) -> "AnswerTotals":
    from cli.live_line import LiveLine
    from storage.retention import count_answers, delete_unused_answers

    if dry_run:
        return count_answers(ledger, unused_s)
    with LiveLine() as line:
        return delete_unused_answers(ledger, cache, unused_s, lambda gone: line.show(lambda: f"{_shown(gone)} deleted"))


def _shown(answers: "AnswerTotals") -> str:
    from cli.finding import shown_bytes

    return f"{counted(answers.num_answers, 'answer')} of {shown_bytes(answers.num_bytes)}"
