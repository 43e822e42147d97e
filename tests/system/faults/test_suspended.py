"""A worker, PostgreSQL or a reverse proxy is suspended for a minute: answers are bounded, and service resumes."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from tests.support.connections import Connection, takes_connections
from tests.support.journal import serving, until
from tests.support.length import scaled
from tests.support.main_process import workers_of
from tests.support.ports import free_port
from tests.support.postgres import cluster
from tests.support.servers import Server, worker, write_config
from tests.support.suspended import is_served, others_are_served, suspended, with_children
from tests.system.postgres.crowd import POOL, Crowd, postgres_config, two_workers
from tests.system.proxies.running import program
from tokenauth.stores.postgres.connections import TIMEOUT

SECONDS = scaled(60, 5)

HAPROXY = """
global
    stats socket {directory}/haproxy.sock
defaults
    mode http
    timeout connect 2s
    timeout client 300s
    timeout server 300s
    option redispatch
frontend front
    bind 127.0.0.1:{port}
    default_backend workers
backend workers
    server tokenauth 127.0.0.1:{server} maxconn 200
"""


def test_a_suspended_worker_holds_up_no_other(tmp_path: Path) -> None:
    """New connections go to the other worker. If it misses its reports for too long, it is replaced."""
    with serving(write_config(tmp_path, "[tokens]\nper_user = 0"), "--workers", "2") as server:
        until(lambda: len(server.events("started")) == 2, "both serve")
        with suspended(workers_of(server)[:1]):
            # a log-out waits up to 1.25 seconds for a sibling that does not answer
            assert others_are_served(server.port, SECONDS, bound=5) > 3
        is_served(server.port)
        until(lambda: len(workers_of(server)) == 2, "two workers serve again")


def test_a_suspended_postgresql_is_503_and_loses_nothing(tmp_path: Path) -> None:
    with cluster() as database:
        assert database._server is not None
        config = postgres_config(tmp_path, database.create("suspended"), POOL)
        with two_workers(config) as servers:
            crowd = Crowd(servers, seed=4)
            with crowd.running(16):
                crowd.busy(200)
                outages, began = crowd.count(503), monotonic()
                with suspended(with_children(database._server.pid)):
                    until(lambda: crowd.count(503) > outages + 20, "the outage is noticed")
                    until(lambda: monotonic() > began + SECONDS, "it lasts", 2 * SECONDS + 60)
                crowd.resumed(monotonic())
                crowd.busy(200)
            slowest = max(seen.at - seen.sent for seen in crowd.seen)
            assert slowest < 3 * TIMEOUT + 5, f"an answer took {slowest:.1f} seconds"
            with worker(config) as fresh:
                crowd.check([fresh])


@contextmanager
def haproxy(directory: Path, server: Server) -> Iterator[tuple[int, int]]:
    """Run HAProxy in front of a server. Yield its port and its process."""
    port, config = free_port(), directory / "haproxy.cfg"
    config.write_text(HAPROXY.format(directory=directory, port=port, server=server.port))
    with (directory / "haproxy.log").open("w") as log:
        process = subprocess.Popen([program("haproxy"), "-db", "-f", str(config)], stdout=log, stderr=log)
        try:
            until(lambda: process.poll() is not None or takes_connections(port), "HAProxy answers")
            yield port, process.pid
        finally:
            process.kill()
            process.wait()


def test_a_suspended_proxy_holds_up_no_one_else(tmp_path: Path) -> None:
    """A token that was revoked meanwhile is refused by the first answer that the proxy lets through."""
    config = write_config(tmp_path, "[tokens]\nper_user = 0")
    with serving(config, "--workers", "2") as server, haproxy(tmp_path, server) as (port, process):
        with Connection(port) as through, Connection(server.port) as direct:
            ended, kept = through.log_in(), through.log_in()
            assert through.valid(ended)
            with suspended(with_children(process)):
                direct.log_out(ended)
                assert others_are_served(server.port, SECONDS, bound=5) > 3
            assert not through.valid(ended)
            assert through.valid(kept)
        is_served(port)
        assert server.errors() == []
