"""Many processes start at once on an empty database."""

from pathlib import Path

import pytest

from tests.support.journal import start_together
from tests.support.servers import write_config

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("number", range(10))
def test_twenty_processes_that_start_at_once_on_an_empty_database_all_serve(tmp_path: Path, number: int) -> None:
    start_together(write_config(tmp_path, "[tokens]\nper_user = 0"), 20)
