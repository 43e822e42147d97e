"""Each password attempt is counted before it is compared, on every route that checks a password."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.servers import HandClock, Server, exchange, worker, write_config
from tests.wire.oauth.forms import basic, form_bytes

FREE = 5
SETTINGS = """
[throttle]
delay = "5m"
[pools.permits]
capacity = 1000
prefill = true
[dialects.simple-token-implement]
pool = "permits"
password = "ann-secret"
"""


def login(secret: str) -> bytes:
    body = f'{{"username": "ann", "password": "{secret}"}}'.encode()
    return b"POST /api/token HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def permit(secret: str) -> bytes:
    """Return a request for a permit of simple-token-implement."""
    return f"GET /issue_token HTTP/1.1\r\nHost: x\r\nX-API-PASSWORD: {secret}\r\n\r\n".encode()


ROUTES: dict[str, Callable[[str], bytes]] = {
    "login": login,
    "oauth, Basic": lambda secret: form_bytes("token", basic(f"ann:{secret}"), {"grant_type": "client_credentials"}),
    "permit": permit,
}


@pytest.fixture(scope="module")
def server(directory: Path, clock: HandClock) -> Iterator[Server]:
    with worker(write_config(directory, SETTINGS), clock) as running:
        yield running


@pytest.mark.parametrize("remembered", [False, True], ids=["new", "remembered"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_burst_is_counted_before_it_is_compared(
    server: Server, clock: HandClock, route: str, remembered: bool
) -> None:
    clock.advance(31 * 86400)
    send = ROUTES[route]

    def attempt(secret: str) -> int:
        return exchange(server.port, send(secret))[0]

    if remembered:
        assert attempt("ann-secret") == 200
    with ThreadPoolExecutor(60) as threads:
        answers = list(threads.map(attempt, [f"wrong-{number}" for number in range(60)]))
        assert answers.count(401) == FREE
        assert set(answers) <= {401, 429, 503}
        secrets = [f"wrong-{number}" for number in range(30)]
        secrets[15] = "ann-secret"
        assert set(threads.map(attempt, secrets)) == {429}, "the right password is throttled like the others"
    clock.advance(300)
    assert attempt("ann-secret") == 200
