"""A keep-alive of many tokens, in random-token-generator, loses none and delays no other request."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.journal import until
from tests.support.servers import HandClock, log_in, probe
from tests.wire.dialects.conftest import Wire, advance_a_day, execute, fill

PREFIX = "/random-token-generator"

ATTEMPTS = 5
"""Attempts: a busy machine can delay a request by itself, but not each time."""


def test_keeping_many_tokens_alive_skips_only_assigned_ones(
    clients: Sequence[httpx.Client], config_file: Path, clock: HandClock
) -> None:
    keep_alive(10_000, clients, config_file, clock)


@pytest.mark.faults
def test_keeping_100_000_tokens_alive_blocks_no_request(
    clients: Sequence[httpx.Client], config_file: Path, clock: HandClock
) -> None:
    """The original blocked its store for 0.8 s. Here no request waits for a quarter of the keep-alive."""
    for _ in range(ATTEMPTS):
        if not keep_alive(100_000, clients, config_file, clock):
            return
        advance_a_day(clock)
        execute(config_file, "DELETE FROM pool_tokens WHERE pool = 'bounded'")
    raise AssertionError(f"a request was delayed in each of {ATTEMPTS} attempts")


def keep_alive(count: int, clients: Sequence[httpx.Client], config_file: Path, clock: HandClock) -> bool:
    """Keep tokens alive while others are assigned, and check all. Return whether a request was delayed."""
    start, others = clock(), [*clients] * 5
    fill(config_file, "bounded", count, start)
    for client in clients:
        until(lambda: client.get("/readyz").status_code == 200, "the workers can write again")  # noqa: B023
    clock.set(start + 200)
    waited = keep_alive_while_others_ask(count, clients, others, config_file, clock())
    assert kept(config_file, start + 200) == count - len(others)
    clock.set(start + 499.9)
    wire = Wire(clients, PREFIX)
    assert wire.post("/assign").status == 200
    clock.set(start + 500)
    left = [wire.post("/assign").status for _ in range(len(others) + 1)]
    assert left == [200] * len(others) + [404], "only the assigned tokens are left"
    return waited


def kept(config_file: Path, now: float) -> int:
    """Return the number of tokens that were kept alive."""
    query = "SELECT count(*) FROM pool_tokens WHERE pool = 'bounded' AND free_at = ?"
    return int(execute(config_file, query, now)[0][0])


def keep_alive_while_others_ask(
    count: int, clients: Sequence[httpx.Client], others: Sequence[httpx.Client], config_file: Path, now: float
) -> bool:
    """Keep all tokens alive, and return whether another request waited for a quarter of that, or until its end."""
    login, waited = log_in(clients[1]), False
    with ThreadPoolExecutor(1) as thread, httpx.Client(base_url=clients[0].base_url, timeout=30) as own:
        keeping: Future[httpx.Response] = thread.submit(own.post, f"{PREFIX}/keep-alive")
        while not kept(config_file, now):
            assert not keeping.done() or kept(config_file, now), keeping.result().text
        for client in others:
            before = kept(config_file, now)
            assert probe(client, login)
            assert client.post(f"{PREFIX}/assign").status_code == 200
            waited |= kept(config_file, now) - before >= count / 4 or keeping.done()
        assert keeping.result().json() == {"message": f"TTL extended successfully for {count} tokens"}
    return waited
