"""Promise 10, at length: 200 reloads and 100 restarts under load."""

from pathlib import Path

from tests.support.length import scaled
from tests.support.restarts import survive_reloads, survive_restarts


def test_200_reloads_under_load_lose_no_request(tmp_path: Path) -> None:
    survive_reloads(tmp_path, scaled(200, 3))


def test_100_restarts_under_load_lose_no_request(tmp_path: Path) -> None:
    survive_restarts(tmp_path, scaled(100, 3))
