"""How long it takes until a node refuses what another node has ended."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from statistics import median, quantiles

from bench.figures import Sample


def measure_news(first: int, second: int, tokens: Iterator[str], seconds: int) -> Sample:
    """End tokens on the first port for so long; after each answer ask the second port until it refuses."""
    delays: list[float] = []
    at_once = 0
    with closing(HTTPConnection("127.0.0.1", first)) as ending, closing(HTTPConnection("127.0.0.1", second)) as asking:
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            token = next(tokens)
            if not _valid(asking, token):  # from now on it is remembered there
                raise RuntimeError(f"{token} is refused before its end")
            ending.request("DELETE", "/api/token", json.dumps({"token": token}), {"Content-Type": "application/json"})
            if (status := _read(ending)[0]) != 200:
                raise RuntimeError(f"DELETE /api/token answered {status}")
            ended = time.perf_counter()
            polls = 1
            while _valid(asking, token):
                polls += 1
            delays.append((time.perf_counter() - ended) * 1000)
            at_once += polls == 1
    note = f"{len(delays):,} ended one by one; {at_once / len(delays):.0%} refused when first asked"
    return Sample(median(delays), p99_ms=quantiles(delays, n=100)[98], note=note)


def _valid(connection: HTTPConnection, token: str) -> bool:
    connection.request("GET", f"/api/token?token={token}")
    return bool(json.loads(_read(connection)[1])["valid"])


def _read(connection: HTTPConnection) -> tuple[int, bytes]:
    with connection.getresponse() as answer:
        return answer.status, answer.read()
