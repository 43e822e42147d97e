"""Promise 2: with `idle`, a login in use never ends early, and an idle one never late. The clock is moved by hand."""

from pathlib import Path

import pytest

from tests.support.connections import Connection
from tests.support.journal import until
from tests.support.servers import START, HandClock, worker, write_config

IDLE, TTL = 400, 3600
MOST = IDLE + IDLE // 4


@pytest.fixture(scope="module")
def settings() -> str:
    return f"[tokens]\nttl = {TTL}\nidle = {IDLE}\n"


def end(connection: Connection, token: str) -> int | None:
    """Return when a token ends, without using it."""
    found: int | None = connection.ask("GET", f"/api/token?token={token}&touch=0").json()["expiry_time"]
    return found


def use_late(connection: Connection, clock: HandClock, token: str) -> int:
    """Use a token in its last second, and return its new end, which every worker then knows."""
    before = end(connection, token)
    assert before is not None
    clock.set(before - 0.5)
    assert connection.valid(token)
    until(lambda: end(connection, token) != before, "the use is written")
    after = end(connection, token)
    assert after is not None
    return after


def test_a_login_in_use_lives_on_in_every_worker_until_its_ttl(
    here: Connection, there: Connection, clock: HandClock
) -> None:
    began = clock()
    token = here.log_in()
    assert end(here, token) == int(began) + MOST
    assert there.valid(token)  # cached there, with its first end
    for _ in range(TTL // MOST - 1):
        assert use_late(here, clock, token) == int(clock() + MOST)
    clock.set(began + TTL - MOST)
    assert there.valid(token), "another worker asks the store again before it refuses"
    assert there.ask("GET", "/api/me", X_Token=token).status == 200
    assert here.ask("POST", "/api/token/renew", X_Token=token).json()["expiry_time"] == int(began) + TTL
    clock.set(int(began) + TTL - 0.001)
    assert here.valid(token)
    assert there.valid(token)
    clock.set(int(began) + TTL)
    assert not here.valid(token)
    assert not there.valid(token)


def test_an_idle_login_ends_in_every_worker(here: Connection, there: Connection, clock: HandClock) -> None:
    """Neither looks with touch=0 nor uses that are not due extend it."""
    token = here.log_in()
    ends_at = int(clock()) + MOST
    assert there.valid(token)
    clock.set(ends_at - 0.001)
    for connection in (here, there):
        assert end(connection, token) == ends_at
        assert connection.ask("GET", "/auth?touch=0", X_Token=token).status == 200
    clock.set(ends_at)
    for connection in (here, there):
        assert not connection.valid(token)
        assert connection.ask("GET", "/api/me", X_Token=token).status == 401
        assert connection.ask("POST", "/api/token/renew", X_Token=token).status == 401


def test_a_renewed_login_lives_on_after_kill_9(tmp_path: Path, settings: str) -> None:
    """What was answered is written."""
    config, clock = write_config(tmp_path, settings), HandClock(tmp_path / "clock", create=True)
    with worker(config, clock) as server, Connection(server.port) as connection:
        token = connection.log_in()
        clock.advance(IDLE)
        answer = connection.ask("POST", "/api/token/renew", X_Token=token)
        server.kill()
    ends_at = int(START) + IDLE + MOST
    assert answer.status == 200
    assert answer.json() == {"valid": True, "expiry_time": ends_at, "max_expiry_time": int(START) + TTL}
    clock.set(ends_at - 1)
    with worker(config, clock) as server, Connection(server.port) as connection:
        assert end(connection, token) == ends_at
        clock.set(ends_at)
        assert not connection.valid(token)


@pytest.mark.parametrize("how", ["SIGTERM", "kill -9"])
def test_a_stop_writes_uses_and_a_kill_loses_the_unwritten(tmp_path: Path, settings: str, how: str) -> None:
    config, clock = write_config(tmp_path, settings), HandClock(tmp_path / "clock", create=True)
    with worker(config, clock) as server, Connection(server.port) as connection:
        token = connection.log_in()
        clock.advance(IDLE / 2)  # due, and far from the end: it is written some seconds later
        assert connection.valid(token)
        server.stop() if how == "SIGTERM" else server.kill()
    ends_at = int(START) + MOST + (IDLE // 2 if how == "SIGTERM" else 0)
    clock.set(ends_at - 1)
    with worker(config, clock) as server, Connection(server.port) as connection:
        assert end(connection, token) == ends_at
        clock.set(ends_at)
        assert not connection.valid(token)
