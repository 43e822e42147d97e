"""Looks at a SQLite database without creating, upgrading or changing it."""

import os
import re
import sqlite3
from contextlib import closing, suppress

from tokenauth.models import DatabaseReport
from tokenauth.stores import schema
from tokenauth.stores.changes.clock import CLOCK
from tokenauth.stores.sqlite import files

_TIMEOUT = 1.0
"""Seconds to wait for a lock."""

_TABLES = """
    SELECT name, type = 'view' FROM sqlite_master
    WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite~_%' ESCAPE '~'
"""
"""Tables and views, each with whether it is a view."""

_NETWORK = re.compile(r"nfs|cifs|smb|afs|9p|ceph|gluster|lustre|gfs|ocfs|sshfs|s3fs|davfs|virtiofs|vboxsf|prl_fs")


def examine(path: str) -> DatabaseReport:
    """Look at the database at an absolute path. Not for a process that has it open: see `files.is_database`."""
    place = network_file_system(os.path.dirname(os.path.realpath(path)))
    if not os.path.exists(path):
        return DatabaseReport(path, exists=False, problem=files.abandoned_wal(path), network=place)
    report = DatabaseReport(path, network=place)
    try:
        with closing(sqlite3.connect(files.existing(path), uri=True, timeout=_TIMEOUT, isolation_level=None)) as db:
            tables = dict(db.execute(_TABLES))
            if "alembic_version" in tables:
                [(report.schema,)] = db.execute("SELECT version_num FROM alembic_version").fetchall() or [(None,)]
            report.others = schema.other_tables(tables.items(), report.schema)
            if "marks" in tables:
                rows = db.execute("SELECT at FROM marks WHERE name = ?", (CLOCK,)).fetchall()
                report.written_at = rows[0][0] if rows else None
            report.problem = _write_problem(db)
    except sqlite3.Error as error:
        report.problem = f"it cannot be read: {error}"
    return report


def _write_problem(db: sqlite3.Connection) -> str | None:
    """Take the lock for writing, and give it back."""
    try:
        db.execute("BEGIN IMMEDIATE")
        db.execute("ROLLBACK")
    except sqlite3.Error as error:
        return f"it cannot be written: {error}"
    return None


def network_file_system(directory: str, mounts: str = "/proc/self/mounts") -> str | None:
    """Return the kind of the file system if it is on another machine: SQLite's locks do not work reliably there.

    `mounts` is Linux's list of file systems. Elsewhere there is none, and no answer.
    """
    found, longest = "", -1
    with suppress(OSError), open(mounts, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            _, place, kind, *_ = line.split(" ")
            place = place.replace("\\040", " ")
            if (place == "/" or f"{directory}/".startswith(f"{place}/")) and len(place) >= longest:
                found, longest = kind, len(place)
    return found if _NETWORK.search(found) else None
