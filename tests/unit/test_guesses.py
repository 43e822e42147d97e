"""The figures in docs/throttle.md match a simulation of the throttle."""

from pathlib import Path

import pytest

from bench.guesses import ATTACKS, row, simulate
from tests.support.servers import ROOT

SHORT = ("no attack", "1 address, 1 name")
TABLE = [line for line in (ROOT / "docs" / "throttle.md").read_text().splitlines() if " of 500 |" in line]


async def check_row(directory: Path, attack: str) -> None:
    """Simulate an attack. Compare the result with its row in the documentation."""
    assert row(attack, await simulate(directory, attack)) in TABLE


@pytest.mark.parametrize("attack", SHORT)
async def test_the_figures_match_the_documentation(tmp_path: Path, attack: str) -> None:
    await check_row(tmp_path, attack)


@pytest.mark.faults
@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack not in SHORT])
async def test_the_other_figures_match_the_documentation(tmp_path: Path, attack: str) -> None:
    await check_row(tmp_path, attack)


def test_each_attack_has_a_row() -> None:
    assert [line.split("|")[1].strip() for line in TABLE] == list(ATTACKS)


async def test_a_day_without_an_attack_refuses_no_login(tmp_path: Path) -> None:
    outcome = await simulate(tmp_path, "no attack", users=200, known=False)
    assert (outcome.refused, outcome.logins) == (0, 200)
