"""SECURITY.md: each promise names its tests, and each named test exists."""

import re

import pytest

from tests.support.servers import ROOT

TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = re.findall(r"`(tests/[^`]*)`", TEXT)
FOLDERS = {"tests/system/faults"}
"""Folders that are named as a whole."""

PROMISES = {int(number): rest for number, rest in re.findall(r"^\| (\d+) \|(.*)\|$", TEXT, re.MULTILINE)}


@pytest.mark.parametrize("named", sorted({*NAMED} - FOLDERS))
def test_each_named_test_exists(named: str) -> None:
    path, _, name = named.partition("::")
    text = (ROOT / path).read_text()
    assert re.search(rf"^(async )?def {name or 'test_'}", text, re.MULTILINE)


def test_each_promise_names_its_tests() -> None:
    assert list(PROMISES) == list(range(1, 16))
    assert [number for number, rest in PROMISES.items() if "`tests/" not in rest] == []


def test_all_tests_of_promises_are_named() -> None:
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests/promises").glob("test_*.py")}
    assert files <= {named.partition("::")[0] for named in NAMED}


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_it_is_found_from_where_people_read(file: str) -> None:
    assert "](SECURITY.md)" in (ROOT / file).read_text()


@pytest.mark.parametrize("linked", re.findall(r"`(docs/[^`]*)`", TEXT))
def test_each_document_that_it_names_exists(linked: str) -> None:
    assert (ROOT / linked).exists()
