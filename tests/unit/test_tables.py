"""Tables of the command line."""

import pytest

from tokenauth.cli.base import relative

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("distance", "shown"),
    [
        (86390, "in 1d"),
        (90 * 86400 - 5, "in 90d"),
        (3599, "in 1h"),
        (89, "in 1m"),
        (59.4, "in 59s"),
        (-30, "30s ago"),
        (-5 * 3600, "5h ago"),
    ],
)
def test_a_distance_is_rounded_as_the_console_does(distance: float, shown: str) -> None:
    assert relative(NOW + distance, NOW) == shown


def test_an_instant_that_is_unknown_shows_nothing() -> None:
    assert relative(None, NOW) == ""
