"""Processes that upgrade one database at the same time."""

import fcntl
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.processes import Forked
from tokenauth.stores import schema

pytestmark = pytest.mark.extended


def test_ten_upgrades_at_once_of_an_empty_database_succeed(tmp_path: Path) -> None:
    path, start_file, log = (tmp_path / name for name in ("tokens.db", "start", "log"))
    streams = [Path(os.devnull), log, log]
    with start_file.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        started = [
            Forked(
                "tests.support.opener",
                ["opener", str(start_file), str(path), str(number)],
                tmp_path,
                streams,
                os.environ,
            )
            for number in range(10)
        ]
    assert [process.wait(60) for process in started] == [0] * 10, log.read_text()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM tokens").fetchone() == (10,)
        assert db.execute("SELECT version_num FROM alembic_version").fetchall() == [(schema.HEAD,)]
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
