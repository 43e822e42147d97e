"""A process that holds a permit: `python -m tests.wire.client_pools.sleeper URL TOKEN CLOCK`."""

import sys
from pathlib import Path

from tests.support.servers import HandClock
from tokenauth.client.pools import PoolClient
from tokenauth.errors import LeaseLost


def main() -> None:
    """Hold a permit until standard input ends. For each line, print whether the lease is lost."""
    url, token, clock = sys.argv[1:]
    with (
        PoolClient(url, headers={"X-Token": token}, monotonic=HandClock(Path(clock))) as pools,
        pools.lease("permit") as lease,
    ):
        print("held", flush=True)
        for _ in sys.stdin:
            try:
                lease.check()
                print("held", flush=True)
            except LeaseLost:
                print("lost", flush=True)


if __name__ == "__main__":
    main()
