"""Promise 9: a crashed holder's token is free again when its lease ends. No process has to notice the crash."""

import signal
import socket
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.connections import Connection
from tests.support.journal import until
from tests.support.pool_users import Lease, PoolUser, refusal
from tests.support.servers import ROOT, HandClock, Server, worker, write_config

LEASE_TTL = 60
TICK = 1 / 1024

HOLDER = """
import sys, time
from tests.support.connections import Connection
from tests.support.pool_users import PoolUser
print(PoolUser(Connection(int(sys.argv[1])), "ann").assign("any").token, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def settings() -> str:
    return f"[pools.any]\nlease_ttl = {LEASE_TTL}\nmanage_scope = 'write'"


@pytest.fixture
def ann(there: Connection) -> PoolUser:
    """Return a user of one worker, with one token in the pool."""
    user = PoolUser(there, "ann")
    user.empty("any")
    user.generate("any")
    return user


def row(directory: Path) -> tuple[Any, ...]:
    """Return the only pool token in the database."""
    with closing(sqlite3.connect(directory / "tokenauth.db")) as db:
        (found,) = db.execute("SELECT * FROM pool_tokens")
    return tuple(found)


def test_a_killed_holders_token_is_free_at_its_leases_end(
    server: Server, ann: PoolUser, clock: HandClock, directory: Path
) -> None:
    """Nothing is written when the lease ends: the unchanged row counts as free."""
    began = int(clock())
    command = [sys.executable, "-c", HOLDER, str(server.port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        token = holder.stdout.readline().strip()
        holder.send_signal(signal.SIGKILL)
    leased = row(directory)
    clock.set(began + LEASE_TTL - TICK)
    assert ann.call("POST", "/any/leases") == refusal("no_free_token")
    clock.set(began + LEASE_TTL)
    assert ann.counts("any") == (1, 0)
    assert row(directory) == leased
    assert ann.assign("any") == Lease(token, "ann", 2, began + 2 * LEASE_TTL, LEASE_TTL)
    assert ann.keep_alive("any", token, fence=1) == refusal("lease_lost")


def test_an_unread_assign_is_free_at_its_leases_end(server: Server, ann: PoolUser, clock: HandClock) -> None:
    """The client resets the connection before it reads the answer, so it does not know its lease."""
    request = f"POST /api/pools/any/leases HTTP/1.1\r\nHost: x\r\nX-Token: {ann.token}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(request)
        until(lambda: ann.counts("any") == (0, 1), "the token is leased")
    clock.advance(LEASE_TTL - TICK)
    assert ann.call("POST", "/any/leases") == refusal("no_free_token")
    clock.advance(TICK)
    assert ann.assign("any").fence == 2


def test_a_lease_ends_also_while_no_process_runs(tmp_path: Path) -> None:
    config = write_config(tmp_path, "[pools.any]")
    clock = HandClock(tmp_path / "clock", create=True)
    with worker(config, clock) as server, Connection(server.port) as connection:
        user = PoolUser(connection)
        user.generate("any")
        lease = user.assign("any", "ci-7")
        server.kill()
    clock.advance(LEASE_TTL)
    with worker(config, clock) as server, Connection(server.port) as connection:
        user = PoolUser(connection)
        assert user.keep_alive("any", lease.token, holder="ci-7", fence=1) == refusal("lease_lost")
        assert user.assign("any", "ci-8").fence == 2
