"""What docs/named-tokens.md tells secret scanners finds named tokens, and little else."""

import re
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.servers import ROOT
from tokenauth.values import new_named_value, new_value

TEXT = (ROOT / "docs" / "named-tokens.md").read_text()


def block(language: str) -> str:
    """Return the only code block of a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return str(found)


@pytest.fixture
def is_named_token() -> Callable[[str], bool]:
    """Return the function in the document."""
    names: dict[str, Any] = {}
    exec(block("python"), names)  # noqa: S102 - our own document
    function: Callable[[str], bool] = names["is_named_token"]
    return function


def test_the_expression_finds_a_token_in_a_line() -> None:
    expression = block("text").strip()
    for _ in range(100):
        value = new_named_value()
        for line in (value, f'token = "{value}"', f"X-Token: {value}\\n", f"https://x/?token={value}&y=1"):
            assert re.findall(expression, line) == [value]
        assert re.findall(expression, f"{value}x") == re.findall(expression, f"x{value}") == []


def test_the_rule_of_gitleaks_has_the_same_expression() -> None:
    (rule,) = tomllib.loads(block("toml"))["rules"]
    assert rule["regex"].replace("(", "").replace(")", "") == block("text").strip()
    value = new_named_value()
    assert re.search(rule["regex"], f"'{value}'")
    assert all(keyword in value for keyword in rule["keywords"])


def test_the_checksum_tells_tokens_from_other_text(is_named_token: Callable[[str], bool]) -> None:
    for _ in range(1000):
        value = new_named_value()
        assert is_named_token(value)
        last = "A" if value[-1] != "A" else "B"
        assert not is_named_token(value[:-1] + last)
        assert not is_named_token("tkn" + new_value()[3:])
