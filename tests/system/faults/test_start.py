"""Many processes start at once on an empty database."""

from pathlib import Path

import pytest

from tests.support.journal import start_together
from tests.support.servers import write_config


@pytest.mark.parametrize("number", range(10))
def test_twenty_processes_start_on_an_empty_database(tmp_path: Path, number: int) -> None:
    start_together(write_config(tmp_path, "[tokens]\nper_user = 0"), 20)
