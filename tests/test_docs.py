"""What is written from the code stands in docs/ as the code has it now."""

import re
from pathlib import Path

import pytest

from docs import generate

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["settings.md", "cli.md"])
def test_generated_pages_are_up_to_date(name: str) -> None:
    written = (generate.FOLDER / name).read_text(encoding="utf-8")

    assert written == generate.pages()[name], "run `make docs`"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
