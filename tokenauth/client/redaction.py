"""Removes pool tokens from the log of httpx, which logs the URL of each request: that of a lease contains the token."""

import logging
import re

import httpx

_LEASE = re.compile(r"(/api/pools/[^/]+/leases/)[^/?#]+")


def _redact(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(
            _LEASE.sub(r"\1(token)", str(value)) if isinstance(value, httpx.URL) else value for value in record.args
        )
    return True


def install() -> None:
    """Install the filter on the logger of httpx. Idempotent."""
    logging.getLogger("httpx").addFilter(_redact)
