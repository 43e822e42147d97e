"""Promise 10: reloads and restarts under load lose no request. At length in `make faults`."""

from pathlib import Path

import pytest

from tests.support.restarts import survive_reloads, survive_restarts


def test_reloads_under_load_lose_no_request(tmp_path: Path) -> None:
    survive_reloads(tmp_path, 2)


@pytest.mark.extended
def test_restarts_under_load_lose_no_request(tmp_path: Path) -> None:
    survive_restarts(tmp_path, 2)
