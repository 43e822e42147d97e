"""A worker prefills and sweeps its pools."""

import sqlite3
from contextlib import closing
from pathlib import Path

from tests.support.connections import Connection
from tests.support.pool_users import PoolUser, refusal
from tests.support.servers import HandClock, worker, write_config

LEASE_TTL = 60
TOKEN_TTL = 300
SWEPT = f"""
[pools.waiting]
token_ttl = {TOKEN_TTL}
[pools.unlimited]
[pools.permits]
capacity = 3
prefill = true
"""


def permits(capacity: int) -> str:
    return f"[pools.permits]\ncapacity = {capacity}\nlease_ttl = {LEASE_TTL}\nprefill = true\n"


def test_a_worker_sweeps_the_pools_of_its_configuration(tmp_path: Path) -> None:
    config = write_config(tmp_path, SWEPT)
    clock = HandClock(tmp_path / "clock", create=True)
    with worker(config, clock) as server, Connection(server.port) as connection:
        admin = PoolUser(connection)
        admin.generate("waiting", 5)
        admin.generate("unlimited", 1)
        server.kill()
    clock.advance(TOKEN_TTL)
    with worker(config, clock) as server, closing(sqlite3.connect(tmp_path / "tokenauth.db")) as db:
        assert server.wait("swept")["rows"] == 5
        left = db.execute("SELECT pool, count(*) FROM pool_tokens GROUP BY pool")
        assert dict(left) == {"unlimited": 1, "permits": 3}


def test_prefilled_tokens_survive_their_worker(tmp_path: Path) -> None:
    config = write_config(tmp_path, permits(2))
    clock = HandClock(tmp_path / "clock", create=True)
    with worker(config, clock) as server, Connection(server.port) as connection:
        admin = PoolUser(connection)
        assert admin.counts("permits") == (2, 0)
        assert admin.call("POST", "/permits/tokens") == refusal("pool_full")
        leases = [admin.assign("permits"), admin.assign("permits")]
        assert len({lease.token for lease in leases}) == 2
        assert {member["expiry_time"] for member in admin.members("permits")} == {None}
        server.kill()
    with worker(write_config(tmp_path, permits(1)), clock) as server, Connection(server.port) as connection:
        admin = PoolUser(connection)
        assert admin.counts("permits") == (0, 2)
        assert [admin.keep_alive("permits", lease.token, fence=1)[0] for lease in leases] == [200, 200]
        assert admin.release("permits", leases[0].token) == (204, None)
        assert admin.call("POST", "/permits/leases") == refusal("no_free_token")
        clock.advance(LEASE_TTL)
        assert admin.counts("permits") == (1, 0)
        assert admin.assign("permits").holder == "admin"
        assert admin.call("POST", "/permits/leases") == refusal("no_free_token")
