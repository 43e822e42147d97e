"""Looks at a PostgreSQL database without creating, upgrading or changing it."""

import time

from sqlalchemy import URL, Connection, select, text

from tokenauth.errors import StartError, StoreUnavailable
from tokenauth.models import DatabaseReport
from tokenauth.stores import schema
from tokenauth.stores.changes.clock import CLOCK
from tokenauth.stores.postgres.connections import UNAVAILABLE, Connections, reason
from tokenauth.stores.tables import marks

_TABLES = text("""
    SELECT relname, relkind IN ('v', 'm') FROM pg_class
    WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
    AND relkind IN ('r', 'p', 'v', 'm', 'f')
    AND NOT EXISTS (
        SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = pg_class.oid AND deptype = 'e'
    )
""")
"""Tables and views, except those of extensions, each with whether it is a view."""

_READ_ONLY = text("SELECT current_setting('transaction_read_only') = 'on', extract(epoch FROM clock_timestamp())")


async def examine(url: URL) -> DatabaseReport:
    """Look at the database at a URL."""
    connections = Connections(url, 1, time.time, caller_time=True)
    report = DatabaseReport(connections.name)
    try:
        await connections.check_encoding()
        await connections.read_once(lambda db: _read(db, report))
        report.problem = report.problem or await connections.standby_problem()
    except StartError as error:
        report.problem = f"it {str(error).removeprefix(f'the database {report.name} ')}"
    except (*UNAVAILABLE, StoreUnavailable, ValueError, OverflowError) as error:
        report.problem = f"it cannot be used: {reason(error)}"
    finally:
        await connections.discard()
    return report


def _read(db: Connection, report: DatabaseReport) -> None:
    [(read_only, now)] = db.execute(_READ_ONLY).all()
    report.clock_ahead = float(now) - time.time()
    if read_only:
        report.problem = "it cannot be written: it is a standby, or read-only"
    report.schema = schema.version(db)
    report.others = schema.other_tables(((name, is_view) for name, is_view in db.execute(_TABLES)), report.schema)
    if report.schema is not None:
        row = db.execute(select(marks.c.at).where(marks.c.name == CLOCK)).first()
        report.written_at = None if row is None else float(row[0])
