"""Options that several commands share."""

from collections.abc import Callable
from functools import wraps
from typing import Any, get_args

import click

from cli.output import Showing
from producer.file_format import FORMATS, format_of
from protocol.priority import PRIORITIES
from protocol.requests import Kind
from protocol.sampling import TOO_LONG, SamplingParams


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the sampling options and hands them to the command as one `params`."""

    @click.option("--max-tokens", type=int, metavar="N", help="Output tokens at most.")
    @click.option("--temperature", type=float, metavar="T", help="0 is greedy and repeatable.")
    @click.option("--top-p", type=float, metavar="P", help="Draw from the likeliest tokens that make up P.")
    @click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest tokens.")
    @click.option("--seed", type=int, metavar="N", help="Makes draws repeatable.")
    @click.option("--n", type=int, metavar="N", help="Samples per prompt.")
    @click.option(
        "--too-long",
        type=click.Choice(TOO_LONG),
        help="A prompt that is too long is an error, which is the default, or loses its beginning: what is left has "
        "room for --max-tokens of answer.",
    )
    @click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; can be given several times.")
    @click.option("--timeout", type=float, metavar="SECONDS", help="From submission; what is late is an error.")
    @wraps(command)
    def with_params(
        max_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        top_k: int | None,
        seed: int | None,
        n: int | None,
        too_long: str | None,
        stop: tuple[str, ...],
        timeout: float | None,
        **others: Any,
    ) -> Any:
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            n=n,
            stop=stop or None,
            too_long=too_long,
            timeout=timeout,
        )
        params.validate()
        return command(params=params, **others)

    return with_params


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what says how an input is read and hands it to the command as one `reading`."""

    @click.option(
        "--input-format",
        type=click.Choice(FORMATS),
        help="What the input is, for stdin or a name that does not say it. Default: by the suffixes, else jsonl.",
    )
    @click.option("--prompt-column", metavar="NAME", help="CSV and Parquet: the column of prompts. Default: prompt.")
    @click.option("--id-column", metavar="NAME", help="CSV and Parquet: the column of each row's custom_id, if any.")
    @click.option(
        "--kind",
        type=click.Choice(get_args(Kind)),
        default="generate",
        show_default=True,
        help="CSV and Parquet: what is asked of each row's prompt.",
    )
    @click.option(
        "--model-map",
        multiple=True,
        metavar="ASKED=SERVED",
        callback=_model_map,
        help="Lines that ask for the model ASKED are answered by SERVED, the one that is served; can be given several "
        "times.",
    )
    @wraps(command)
    def with_reading(
        input_format: str | None,
        prompt_column: str | None,
        id_column: str | None,
        kind: Kind,
        model_map: dict[str, str],
        **others: Any,
    ) -> Any:
        from producer.columns import Columns
        from producer.source import Reading

        columns = Columns(prompt_column or Columns().prompt, id_column, kind)
        file_format = None if input_format is None else format_of(input_format)
        return command(reading=Reading(file_format, columns, model_map), **others)

    return with_reading


def showing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what says how Results are written and hands it to the command as one `showing`."""

    @click.option(
        "--format",
        "result_format",
        type=click.Choice(("flat", "openai")),
        default="flat",
        show_default=True,
        help="An object or row for each sample, or OpenAI's batch output: an object for each line.",
    )
    @click.option(
        "--order",
        type=click.Choice(("input", "finished")),
        default="input",
        show_default=True,
        help="Results in the order of the lines, or as they finish.",
    )
    @click.option("--errors", metavar="FILE", help="Write errors there instead of beside the results.")
    @wraps(command)
    def with_showing(result_format: Any, order: Any, errors: str | None, **others: Any) -> Any:
        return command(showing=Showing(result_format, order, errors), **others)

    return with_showing


def _model_map(_context: click.Context, _parameter: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    model_map: dict[str, str] = {}
    for pair in pairs:
        asked, _, served = pair.partition("=")
        if not asked or not served:
            raise click.BadParameter(f"{pair!r} is not of the form ASKED=SERVED.")
        if model_map.setdefault(asked, served) != served:
            raise click.BadParameter(f"{asked!r} is mapped to two models.")
    return model_map


def not_empty(_context: click.Context, _parameter: click.Parameter, name: str | None) -> str | None:
    if name == "":
        raise click.BadParameter("the name is empty.")
    return name


job_option = click.option(
    "--job",
    "name",
    metavar="NAME",
    callback=not_empty,
    help="Name the Job; the same name, or its id, goes on with it, whatever the input: once all lines are in, it is "
    "not read again. Needed for stdin. Default: equal input, options and model are the same Job.",
)

priority_option = click.option(
    "--priority",
    type=click.Choice(PRIORITIES),
    help="What is more urgent goes first, whatever else waits. Default: normal. With a Job that is there already it "
    "changes that of what nobody has begun.",
)

retry_option = click.option(
    "--retry-errors",
    is_flag=True,
    help="Try the Job's errors again whose cause may be gone: prompts that were too long for how the model was "
    "served, a dead engine, a chat template.",
)
