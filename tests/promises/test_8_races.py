"""Promise 8: no two live leases of one token, never more than `capacity`, and fences only grow; nothing is lost."""

import pytest

from tests.support.history import HandTime
from tests.support.races import POOLS, run_race
from tests.support.servers import HandClock, Server

LEASE_TTL = 30.0
REQUESTS = 3000


@pytest.fixture(scope="module")
def settings() -> str:
    """Have the pools of a race."""
    return POOLS % {"lease_ttl": LEASE_TTL}


def test_thirty_racing_holders_break_no_promise(server: Server, sibling: Server, clock: HandClock) -> None:
    """The short form of `make faults`: time jumps while requests are under way, often to just before a lease ends."""
    run_race([server.port, sibling.port], HandTime(clock), LEASE_TTL, REQUESTS)
