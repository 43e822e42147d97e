"""Whatever is compared is counted first, at every door: a burst passes no more than may fail; then all wait."""

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
    """Write a login."""
    body = f'{{"username": "ann", "password": "{secret}"}}'.encode()
    return b"POST /api/token HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def permit(secret: str) -> bytes:
    """Ask for a permit of simple-token-implement."""
    return f"GET /issue_token HTTP/1.1\r\nHost: x\r\nX-API-PASSWORD: {secret}\r\n\r\n".encode()


DOORS: dict[str, Callable[[str], bytes]] = {
    "login": login,
    "oauth, Basic": lambda secret: form_bytes("token", basic(f"ann:{secret}"), {"grant_type": "client_credentials"}),
    "permit": permit,
}


@pytest.fixture(scope="module")
def server(directory: Path, clock: HandClock) -> Iterator[Server]:
    """Run one worker."""
    with worker(write_config(directory, SETTINGS), clock) as running:
        yield running


@pytest.mark.parametrize("remembered", [False, True], ids=["new", "remembered"])
@pytest.mark.parametrize("door", DOORS)
def test_a_burst_is_counted_before_it_is_compared(
    server: Server, clock: HandClock, door: str, remembered: bool
) -> None:
    clock.advance(31 * 86400)
    send = DOORS[door]

    def ask(secret: str) -> int:
        return exchange(server.port, send(secret))[0]

    if remembered:
        assert ask("ann-secret") == 200
    with ThreadPoolExecutor(60) as crowd:
        answers = list(crowd.map(ask, [f"wrong-{number}" for number in range(60)]))
        assert answers.count(401) == FREE
        assert set(answers) <= {401, 429, 503}
        secrets = [f"wrong-{number}" for number in range(30)]
        secrets[15] = "ann-secret"
        assert set(crowd.map(ask, secrets)) == {429}, "the right one is not told from the others"
    clock.advance(300)
    assert ask("ann-secret") == 200
