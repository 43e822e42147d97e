"""Promise 8: no two live leases of one token, never more than `capacity`, fences only grow, no token is lost."""

import pytest

from tests.support.history import HandTime
from tests.support.races import POOLS, run_race
from tests.support.servers import HandClock, Server

LEASE_TTL = 30.0
REQUESTS = 3000


@pytest.fixture(scope="module")
def settings() -> str:
    return POOLS % {"lease_ttl": LEASE_TTL}


def test_thirty_racing_holders_break_no_promise(server: Server, sibling: Server, clock: HandClock) -> None:
    """A short version of `make faults`: the clock jumps during requests, often to just before a lease ends."""
    run_race([server.port, sibling.port], HandTime(clock), LEASE_TTL, REQUESTS)
