"""Promise 2: an expired token is never accepted, not from the cache, and not after the clock was set back."""

from pathlib import Path

import pytest

from tests.support.connections import Connection
from tests.support.journal import until
from tests.support.servers import HandClock, worker, write_config

TTL = 100


@pytest.fixture(scope="module")
def settings() -> str:
    """Give tokens a short lifetime."""
    return f"[tokens]\nttl = {TTL}"


def accepted(connection: Connection, token: str) -> bool:
    """Whether a guarded route accepts the token."""
    return connection.ask("GET", "/api/me", X_Token=token).status == 200


def test_expired_is_never_accepted_also_from_the_cache(here: Connection, there: Connection, clock: HandClock) -> None:
    """At `expires_at` it has expired, in the worker that issued the token and in one that has cached it."""
    token = here.log_in()
    expires_at = here.ask("GET", f"/api/token?token={token}").json()["expiry_time"]
    clock.set(expires_at - 0.001)
    assert here.valid(token)
    assert there.valid(token)
    assert accepted(there, token)
    clock.set(expires_at)
    assert not here.valid(token)
    assert not there.valid(token)
    assert not accepted(there, token)


def test_a_clock_that_is_set_back_revives_nothing(here: Connection, there: Connection, clock: HandClock) -> None:
    """Neither a cached token nor one that was never looked up before."""
    began = clock()
    cached, unseen = here.log_in(), here.log_in()
    assert here.valid(cached)
    assert there.valid(cached)
    clock.advance(TTL + 1)
    assert not here.valid(cached)
    assert not there.valid(cached)
    clock.set(began)
    for connection in (here, there):
        assert not connection.valid(cached)
        assert not connection.valid(unseen)
        assert not accepted(connection, cached)
    clock.set(began + TTL + 2)


def test_workers_agree_after_a_clock_that_jumped_ahead(here: Connection, there: Connection, clock: HandClock) -> None:
    """Only one worker answered a request while the clock was ahead. What it found expired has expired in both."""
    began = clock()
    tokens = [here.log_in() for _ in range(3)]
    assert there.valid(tokens[0])
    clock.advance(TTL + 1)
    assert not here.valid(tokens[0])
    clock.set(began)
    until(lambda: not there.valid(tokens[0]), "the other worker knows the later time")
    for connection in (here, there):
        assert not any(connection.valid(token) for token in tokens)
    fresh = there.log_in()
    assert here.valid(fresh)
    clock.set(began + TTL + 2)


def test_a_clock_that_is_set_back_extends_no_token(here: Connection, clock: HandClock) -> None:
    """A token that is issued while the clock is behind expires as if the clock had not been set back."""
    began = clock()
    assert here.valid(here.log_in())
    clock.set(began - 3600)
    answer = here.ask("POST", "/api/token", {"username": "ann", "password": "ann-secret"}).json()
    assert answer["expiry_time"] == int(began) + TTL
    clock.set(began + TTL)
    assert not here.valid(answer["token"])


@pytest.mark.parametrize("end", ["SIGTERM", "kill -9"])
def test_a_restart_with_the_clock_set_back_revives_nothing(tmp_path: Path, end: str) -> None:
    """A clean stop stores the time. After a kill, the time of the last write is known."""
    config = write_config(tmp_path, f"[tokens]\nttl = {TTL}")
    clock = HandClock(tmp_path / "clock", create=True)
    with worker(config, clock) as server, Connection(server.port) as connection:
        token = connection.log_in()
        clock.advance(TTL)
        assert not connection.valid(token)
        if end == "SIGTERM":
            server.stop()
        else:
            connection.log_in()
            server.kill()
    clock.advance(-TTL / 2)
    with worker(config, clock) as server, Connection(server.port) as connection:
        assert not connection.valid(token)
        assert not accepted(connection, token)
        assert connection.valid(connection.log_in())
