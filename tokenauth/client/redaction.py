"""httpx logs the address of each request, at INFO, and that of a lease has the token in it: here it is taken out."""

import logging
import re

import httpx

_LEASE = re.compile(r"(/api/pools/[^/]+/leases/)[^/?#]+")


def _redact(record: logging.LogRecord) -> bool:
    """Write `(token)` where the address of a lease names it; keep the record."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            _LEASE.sub(r"\1(token)", str(value)) if isinstance(value, httpx.URL) else value for value in record.args
        )
    return True


def install() -> None:
    """Have it done for all that httpx logs in this program; once is as good as twice."""
    logging.getLogger("httpx").addFilter(_redact)
