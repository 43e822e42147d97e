"""Promise 3 on PostgreSQL: once a revocation is answered, the other workers of the machine refuse the token at once.

Their notification from the database would arrive later.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic
from urllib.parse import urlencode

import pytest

from tests.promises.test_3_held_log_outs import connected
from tests.support.browsing import hidden
from tests.support.connections import Answer, Connection
from tests.support.journal import serving, until
from tests.support.main_process import workers_of
from tests.support.postgres import Cluster
from tests.support.servers import Server, serve
from tests.system.postgres.nodes import fresh, write_config_for
from tokenauth.revocation_queue import ANSWER_TIMEOUT
from tokenauth.stores.postgres.listener import BOUND

ROUNDS = pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=pytest.mark.faults)])
BOB = ("bob", "bob-secret")
SETTINGS = """
[tokens]
per_user = 5
[browser]
url = "http://127.0.0.1"
"""


def wait_for_starts(server: Server, count: int) -> None:
    """Wait until `count` workers have started, replaced ones included."""
    until(lambda: len(server.events("started")) >= count, f"{count} workers have started")


@pytest.fixture(scope="module")
def two(postgres: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve with two workers, and wait until both have started."""
    directory = tmp_path_factory.mktemp("siblings")
    with fresh(postgres) as url, serving(write_config_for(url, directory, SETTINGS), "--workers", "2") as server:
        wait_for_starts(server, 2)
        yield server


@pytest.fixture
def pair(two: Server) -> Iterator[list[Connection]]:
    """Connect to each worker."""
    with ExitStack() as stack:
        yield [stack.enter_context(connected(two, pid)) for pid in workers_of(two)]


def post_form(connection: Connection, path: str, fields: dict[str, str], cookie: str = "") -> Answer:
    body = urlencode(fields)
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/x-www-form-urlencoded"]
    lines += [f"Content-Length: {len(body)}", *([f"Cookie: {cookie}"] if cookie else [])]
    return connection.send("\r\n".join([*lines, "", body]).encode())


def _log_out(here: Connection, tokens: Sequence[str]) -> Sequence[str]:
    here.log_out(tokens[0])
    return tokens[:1]


def _log_out_many(here: Connection, tokens: Sequence[str]) -> Sequence[str]:
    assert here.ask("DELETE", "/api/token", {"token": " ".join(tokens)}).status == 200
    return tokens


def _oauth(here: Connection, tokens: Sequence[str]) -> Sequence[str]:
    form = {"token": tokens[0], "client_id": "bob", "client_secret": "bob-secret"}
    assert post_form(here, "/oauth/revoke", form).status == 200
    return tokens[:1]


def _by_id(here: Connection, tokens: Sequence[str]) -> Sequence[str]:
    id = here.ask("GET", "/api/me", X_Token=tokens[0]).json()["id"]
    assert here.ask("DELETE", f"/api/tokens/{id}", X_Token=tokens[1]).status == 204
    return tokens[:1]


def _all(here: Connection, tokens: Sequence[str]) -> Sequence[str]:
    assert here.ask("DELETE", "/api/tokens", X_Token=tokens[0]).status == 200
    return tokens


def _all_but_one(here: Connection, tokens: Sequence[str]) -> Sequence[str]:
    assert here.ask("DELETE", "/api/tokens?keep=current", X_Token=tokens[0]).status == 200
    return tokens[1:]


def _by_an_admin(here: Connection, tokens: Sequence[str]) -> Sequence[str]:
    assert here.ask("DELETE", "/api/tokens?user=bob", X_Token=here.log_in()).status == 200
    return tokens


def _by_evicting(here: Connection, tokens: Sequence[str]) -> Sequence[str]:
    for _ in range(5):
        here.log_in(*BOB)
    return tokens


def _fill_in(here: Connection, path: str, token: str, **fields: str) -> None:
    """Send the form of a page with the cookie of a login."""
    csrf = hidden(here.ask("GET", "/login").body.decode(), "csrf")
    answer = post_form(here, path, {"csrf": csrf, **fields}, f"tokenauth={token}; tokenauth-form={csrf}")
    assert answer.status == 303, answer


def _page_log_out(here: Connection, tokens: Sequence[str]) -> Sequence[str]:
    _fill_in(here, "/logout", tokens[0])
    return tokens[:1]


def _page_log_in(here: Connection, tokens: Sequence[str]) -> Sequence[str]:
    _fill_in(here, "/login", tokens[0], username="bob", password="bob-secret")
    return tokens[:1]


def _page_everywhere(here: Connection, tokens: Sequence[str]) -> Sequence[str]:
    _fill_in(here, "/logout", tokens[0], everywhere="1")
    return tokens


def _named(here: Connection, there: Connection, login: str) -> tuple[str, str]:
    """Return a new named token that both workers have cached, and its id."""
    made = here.ask("POST", "/api/tokens", {"name": os.urandom(8).hex()}, X_Token=login)
    assert made.status == 201, made
    assert there.valid(made.json()["token"])
    return made.json()["token"], made.json()["id"]


WAYS = {
    "log out": _log_out,
    "log out many": _log_out_many,
    "oauth": _oauth,
    "by id": _by_id,
    "all": _all,
    "all but one": _all_but_one,
    "by an admin": _by_an_admin,
    "evicted": _by_evicting,
    "page log out": _page_log_out,
    "page log in": _page_log_in,
    "page everywhere": _page_everywhere,
}


@ROUNDS
@pytest.mark.parametrize("end", WAYS.values(), ids=WAYS)
def test_no_sibling_accepts_what_was_revoked(
    pair: list[Connection], end: Callable[[Connection, Sequence[str]], Sequence[str]], rounds: int
) -> None:
    """Both workers have the tokens in their caches. Other tokens stay valid."""
    kept = pair[0].log_in("ann", "ann-secret")
    for number in range(rounds):
        here, there = pair if number % 2 else pair[::-1]
        tokens = [here.log_in(*BOB) for _ in range(3)]
        assert all(connection.valid(token) for connection in (here, there) for token in tokens)
        ended = end(here, tokens)
        assert not [token for token in ended if there.valid(token)], f"accepted in round {number}"
        assert not [token for token in ended if here.valid(token)]
    assert all(connection.valid(kept) for connection in pair)


@ROUNDS
@pytest.mark.parametrize("how", ["rotate", "delete", "delete all"])
def test_no_sibling_accepts_an_ended_named_token(pair: list[Connection], how: str, rounds: int) -> None:
    for number in range(rounds):
        here, there = pair if number % 2 else pair[::-1]
        login = here.log_in("ann", "ann-secret")
        token, id = _named(here, there, login)
        method, target = {
            "rotate": ("POST", f"/api/tokens/{id}/rotate"),
            "delete": ("DELETE", f"/api/tokens/{id}"),
            "delete all": ("DELETE", "/api/tokens?kind=named"),
        }[how]
        assert here.ask(method, target, X_Token=login).status in {200, 201, 204}
        assert not there.valid(token), f"accepted in round {number}"
        assert here.ask("DELETE", "/api/tokens?kind=all", X_Token=login).status == 200


def test_a_suspended_sibling_delays_but_accepts_nothing(two: Server, pair: list[Connection]) -> None:
    """It is waited for until it no longer trusts its cache. The others are answered."""
    here, there = pair
    for end in (_log_out, _all):
        tokens = [here.log_in(*BOB) for _ in range(3)]
        assert all(map(there.valid, tokens))
        sleeper = workers_of(two)[1]
        os.kill(sleeper, signal.SIGSTOP)
        try:
            began = monotonic()
            ended = end(here, tokens)
            assert monotonic() - began > BOUND
        finally:
            os.kill(sleeper, signal.SIGCONT)
        assert not [token for token in ended if there.valid(token)]


LONG = 60.0
"""Seconds for which a log-out waits for other workers: long enough to be noticed on a busy machine, too."""


@contextmanager
def long_waits(cluster: Cluster, directory: Path, workers: int) -> Iterator[Server]:
    """Serve, and let log-outs wait long for workers that do not answer."""
    with (
        fresh(cluster) as url,
        serve(write_config_for(url, directory), "--workers", str(workers), env={"ANSWER_TIMEOUT": str(LONG)}) as server,
    ):
        wait_for_starts(server, workers)
        yield server


def seconds_to_log_out(connection: Connection, token: str) -> float:
    began = monotonic()
    connection.log_out(token)
    return monotonic() - began


def test_a_killed_sibling_is_not_waited_for(postgres: Cluster, tmp_path: Path) -> None:
    """Neither is one that is starting."""
    with long_waits(postgres, tmp_path, 2) as server:
        for round in range(5):
            gone, stays = workers_of(server)
            with connected(server, stays) as here:
                token = here.log_in()
                os.kill(gone, signal.SIGKILL)
                assert seconds_to_log_out(here, token) < LONG / 2
                assert not here.valid(token)
            wait_for_starts(server, 3 + round)


def test_a_single_worker_waits_for_nobody(postgres: Cluster, tmp_path: Path) -> None:
    """It does not even need the main process."""
    with long_waits(postgres, tmp_path, 1) as server, Connection(server.port) as connection:
        token = connection.log_in()
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            assert seconds_to_log_out(connection, token) < LONG / 2
        finally:
            os.kill(server.process.pid, signal.SIGCONT)


def test_the_wait_outlasts_every_cache_and_ends_soon_after() -> None:
    """Timers may fire a few milliseconds early."""
    assert BOUND + 0.2 <= ANSWER_TIMEOUT <= BOUND + 0.5


@pytest.mark.faults
def test_four_workers_refuse_1000_log_outs_at_once(postgres: Cluster, tmp_path: Path) -> None:
    tables = "[tokens]\nper_user = 0"
    with fresh(postgres) as url, serving(write_config_for(url, tmp_path, tables), "--workers", "4") as server:
        wait_for_starts(server, 4)
        with ExitStack() as stack:
            all_of_them = [stack.enter_context(connected(server, pid)) for pid in workers_of(server)]
            for number in range(1000):
                here, *others = all_of_them[number % 4 :] + all_of_them[: number % 4]
                token = here.log_in()
                assert all(connection.valid(token) for connection in others)
                here.log_out(token)
                assert not [one for one in others if one.valid(token)], f"accepted in round {number}"
