"""A keep-alive of a hundred thousand tokens, in random-token-generator, keeps nobody waiting."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.dialects.conftest import Wire, execute, fill
from tests.servers import HandClock, log_in, probe

PREFIX = "/random-token-generator"
CROWD = 100_000


@pytest.fixture
def crowd(config_file: Path, clock: HandClock) -> None:
    """Put 100,000 free tokens into the pool, as if its capacity had been cut after they were made."""
    fill(config_file, "bounded", CROWD, clock())


@pytest.mark.usefixtures("crowd")
def test_others_are_answered_while_a_hundred_thousand_tokens_are_kept_alive(
    clients: Sequence[httpx.Client], config_file: Path, at: Callable[[float], None], clock: HandClock
) -> None:
    """The original blocked its store for 0.8 s. Here nobody, at either worker, waits for so much as a quarter of it."""
    at(200)
    wire = Wire(clients, PREFIX)
    login, now, others = log_in(clients[1]), clock(), [*clients] * 5

    def kept() -> int:
        query = "SELECT count(*) FROM pool_tokens WHERE pool = 'bounded' AND free_at = ?"
        return int(execute(config_file, query, now)[0][0])

    with ThreadPoolExecutor(1) as thread, httpx.Client(base_url=clients[0].base_url, timeout=30) as own:
        keeping: Future[httpx.Response] = thread.submit(own.post, f"{PREFIX}/keep-alive")
        while not kept():
            assert not keeping.done(), keeping.result().text
        for client in others:
            before = kept()
            assert probe(client, login)
            assert client.post(f"{PREFIX}/assign").status_code == 200
            assert kept() - before < CROWD / 4, "it had to wait"
            assert not keeping.done(), "it had to wait until the end"
        assert keeping.result().json() == {"message": f"TTL extended successfully for {CROWD} tokens"}
    assert kept() == CROWD - len(others)
    at(499.9)
    assert wire.post("/assign").status == 200
    at(500)
    left = [wire.post("/assign").status for _ in range(len(others) + 1)]
    assert left == [200] * len(others) + [404], "only those are left that had been assigned"
