"""Promise 3: every worker of the machine refuses a revoked token at once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.connections import Connection
from tests.support.servers import HandClock
from tests.system.test_cli import run

TIMES = 100


@pytest.fixture(scope="module")
def settings() -> str:
    """Allow five tokens per user, so that the sixth evicts the oldest."""
    return "[tokens]\nper_user = 5"


def test_the_other_worker_refuses_on_its_next_request(here: Connection, there: Connection) -> None:
    """Each time the other worker has the token in its cache. `tests/system/faults` tests more workers under load."""
    for number in range(TIMES):
        token = here.log_in()
        assert there.valid(token), f"round {number}"
        here.log_out(token)
        assert not there.valid(token), f"accepted in round {number} after its revocation was answered"


def _all(here: Connection, tokens: list[str], config: Path) -> None:
    assert here.ask("DELETE", "/api/tokens", X_Token=tokens[0]).json() == {"revoked": len(tokens)}


def _all_but_one(here: Connection, tokens: list[str], config: Path) -> None:
    assert here.ask("DELETE", "/api/tokens?keep=current", X_Token=tokens[0]).status == 200
    tokens.pop(0)


def _by_id(here: Connection, tokens: list[str], config: Path) -> None:
    listed = here.ask("GET", "/api/tokens", X_Token=tokens[0]).json()["tokens"]
    for row in sorted(listed, key=lambda row: bool(row["current"])):
        assert here.ask("DELETE", f"/api/tokens/{row['id']}", X_Token=tokens[0]).status == 204


def _by_an_admin(here: Connection, tokens: list[str], config: Path) -> None:
    assert here.ask("DELETE", "/api/tokens?user=bob", X_Token=here.log_in()).json() == {"revoked": len(tokens)}


def _by_evicting(here: Connection, tokens: list[str], config: Path) -> None:
    HandClock(config.with_name("clock")).advance(1)
    for _ in range(5):
        here.log_in("bob", "bob-secret")


def _by_command(here: Connection, tokens: list[str], config: Path) -> None:
    assert run(config.parent, "tokens", "revoke", "--user", "bob").stdout == f"Revoked {len(tokens)} tokens.\n"


@pytest.mark.parametrize("end", [_all, _all_but_one, _by_id, _by_an_admin, _by_evicting, _by_command])
def test_every_way_to_end_tokens_reaches_all_workers(
    here: Connection, there: Connection, config_file: Path, end: Callable[[Connection, list[str], Path], None]
) -> None:
    """Both workers have all of the user's tokens in their caches. Other users' tokens stay valid."""
    other = here.log_in("ann", "ann-secret")
    here.ask("DELETE", "/api/tokens", X_Token=here.log_in("bob", "bob-secret"))
    tokens = [here.log_in("bob", "bob-secret") for _ in range(3)]
    assert all(connection.valid(token) for connection in (here, there) for token in tokens)
    end(here, tokens, config_file)
    assert not [token for token in tokens if there.valid(token)]
    assert not [token for token in tokens if here.valid(token)]
    assert there.ask("GET", "/api/me", X_Token=tokens[-1]).status == 401
    assert there.valid(other)


def test_tokens_beyond_per_user_evict_the_oldest_ones(here: Connection, there: Connection, clock: HandClock) -> None:
    tokens = []
    for _ in range(9):
        clock.advance(1)
        tokens.append(here.log_in("ann", "ann-secret"))
    assert [there.valid(token) for token in tokens] == [False] * 4 + [True] * 5
