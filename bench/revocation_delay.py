"""Measures how long it takes until a node refuses a token that another node has revoked."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from statistics import median, quantiles

from bench.figures import Sample


def measure_revocation_delay(first: int, second: int, tokens: Iterator[str], seconds: int) -> Sample:
    """Revoke tokens on the first port for some seconds; after each, ask the second port until it refuses the token."""
    delays: list[float] = []
    at_first_poll = 0
    with (
        closing(HTTPConnection("127.0.0.1", first)) as revoker,
        closing(HTTPConnection("127.0.0.1", second)) as asker,
    ):
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            token = next(tokens)
            if not _valid(asker, token):  # now it is in the cache of that node
                raise RuntimeError(f"{token} is refused before it was revoked")
            revoker.request("DELETE", "/api/token", json.dumps({"token": token}), {"Content-Type": "application/json"})
            if (status := _read(revoker)[0]) != 200:
                raise RuntimeError(f"DELETE /api/token answered {status}")
            revoked = time.perf_counter()
            polls = 1
            while _valid(asker, token):
                polls += 1
            delays.append((time.perf_counter() - revoked) * 1000)
            at_first_poll += polls == 1
    note = f"{len(delays):,} revoked one by one; {at_first_poll / len(delays):.0%} refused at the first poll"
    return Sample(median(delays), p99_ms=quantiles(delays, n=100)[98], note=note)


def _valid(connection: HTTPConnection, token: str) -> bool:
    connection.request("GET", f"/api/token?token={token}")
    return bool(json.loads(_read(connection)[1])["valid"])


def _read(connection: HTTPConnection) -> tuple[int, bytes]:
    with connection.getresponse() as answer:
        return answer.status, answer.read()
