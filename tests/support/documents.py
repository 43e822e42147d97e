"""The documents, for tests that compare them with the program or run what they show."""

import re

from tests.support.servers import ROOT


def read(name: str) -> str:
    """Return the text of a document."""
    return (ROOT / name).read_text()


def section(text: str, heading: str) -> str:
    """Return what is below a heading, up to the next one of its level or above."""
    level = heading.partition(" ")[0]
    after = text.partition(f"\n{heading}\n")[2]
    assert after, f"no heading {heading!r}"
    return re.split(rf"^#{{1,{len(level)}}} ", after, maxsplit=1, flags=re.MULTILINE)[0]


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def rows(text: str) -> list[list[str]]:
    """Return the cells of all table rows whose first cell is code."""
    lines = re.findall(r"^\| (`.*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
