from cli.summary import Summary
from protocol.requests import Answer, Failure, Result


def answer(line: int, text: str) -> Result:
    return Result(line=line, answer=Answer(text=text, finish_reason="stop", prompt_tokens=1, completion_tokens=1))


def test_first_three_answers_are_shown_with_their_prompts() -> None:
    summary = Summary()
    summary.add(Result(line=1, failure=Failure("invalid_json", "no")))
    # A score, say, has no text to show.
    summary.add(answer(9, ""))
    for line in (2, 3, 4, 5):
        summary.add(answer(line, f"answer {line}"))

    assert summary.first_answers({2: "two?", 3: "three?"}) == (
        "   2: two?\n   -> answer 2\n   3: three?\n   -> answer 3\n   4:\n   -> answer 4"
    )


def test_long_and_wide_texts_are_shortened_and_keep_their_indentation() -> None:
    summary = Summary()
    summary.add(answer(1, "\n".join(["def f():", "\treturn 1", *"abcdef"])))

    assert summary.first_answers({1: "x" * 200}) == (
        f"   1: {'x' * 97}...\n   -> def f():\n          return 1\n      a\n      b\n      ..."
    )


def test_control_characters_do_not_reach_the_terminal() -> None:
    summary = Summary()
    summary.add(answer(1, "a\x1b[31mb\x07c\rd"))

    assert summary.first_answers({}) == "   1:\n   -> a [31mb c d"


def test_nothing_is_shown_when_there_is_no_answer() -> None:
    assert Summary().first_answers({}) == ""
