"""Before all promises: any number of processes can start at once on an empty database."""

from pathlib import Path

from tests.support.journal import start_together
from tests.support.servers import write_config


def test_ten_processes_start_on_an_empty_database(tmp_path: Path) -> None:
    start_together(write_config(tmp_path, "[tokens]\nper_user = 0"), 10)
