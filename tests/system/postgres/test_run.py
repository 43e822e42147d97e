"""`tokenauth run` against two nodes on one PostgreSQL database."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.connections import Connection
from tests.support.journal import until
from tests.support.pool_users import PoolUser
from tests.support.servers import Server, worker
from tests.support.wrapped import Wrapper, ended, wrapping
from tests.system.postgres.nodes import write_config_for
from tests.system.test_run import SLEEP

POOLS = """
[pools.permit]
capacity = 1
prefill = true
lease_ttl = 12
"""


@pytest.fixture
def two(url: str, tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    """Run a worker of each of two nodes, with their own clocks and directories."""
    homes = [tmp_path / name for name in ("one", "two")]
    for home in homes:
        home.mkdir()
    with worker(write_config_for(url, homes[0], POOLS)) as one, worker(write_config_for(url, homes[1], POOLS)) as two:
        yield one, two


@pytest.fixture
def wrap(two: tuple[Server, Server], tmp_path: Path) -> Iterator[Wrapper]:
    """Return what starts `tokenauth run` at the first node."""
    with wrapping(tmp_path, two[0].url) as wrapper:
        yield wrapper


@pytest.fixture
def admin(two: tuple[Server, Server]) -> Iterator[PoolUser]:
    """Log in as the administrator at the other node."""
    with Connection(two[1].port) as connection:
        yield PoolUser(connection)


def test_a_run_waits_for_another_node_and_keeps_its_lease(wrap: Wrapper, admin: PoolUser) -> None:
    before = admin.assign("permit")
    run = wrap("--pool", "permit", "--wait", "10m", *SLEEP)
    until(lambda: admin.keep_alive("permit", before.token)[0] == 200 and "place 1 of 1" in run.err, "it waits")
    admin.release("permit", before.token)
    command = run.command()
    (lease,) = admin.members("permit")
    assert (lease["user"], lease["fence"]) == ("ann", before.fence + 1)
    until(lambda: admin.members("permit")[0]["lease_expiry_time"] > lease["lease_expiry_time"], "it is kept")
    assert not ended(command)
    forced = f"/permit/leases/{lease['token']}?force=true"
    assert admin.call("DELETE", forced, {"reason": "device is stuck"}) == (204, None)
    assert run.wait() == 76
    assert ended(command)
    assert run.err.endswith("The manager 'admin' has ended your lease. Reason: device is stuck.\n")


def test_a_run_releases_its_token_on_every_node(wrap: Wrapper, admin: PoolUser) -> None:
    runs = [wrap("--pool", "permit", "--wait", "10m", "echo", "ran") for _ in range(3)]
    assert [run.wait() for run in runs] == [0] * 3
    assert admin.counts("permit") == (1, 0)
    assert admin.assign("permit").fence == 4
