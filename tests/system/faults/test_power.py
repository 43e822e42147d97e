"""Promise 1, at length: a power failure at any instant loses nothing that was answered."""

from pathlib import Path

from tests.support.length import scaled
from tests.support.power import record


def test_1000_power_failures_lose_nothing(tmp_path: Path) -> None:
    assert list(record(tmp_path, scaled(250, 40)).faults(scaled(1000, 50), booted=scaled(50, 3))) == []
