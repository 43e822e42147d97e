"""Two nodes of tokenauth behind HAProxy, with the files of docs/scaling.md, on the database of three machines."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.connections import takes_connections
from tests.support.journal import until
from tests.support.ports import free_port
from tests.support.queueing import POOLS as LINES
from tests.support.races import POOLS
from tests.support.servers import USERS, Server, serve
from tests.system.failover.machines import PASSWORD, replaced
from tests.system.proxies.running import program

LEASE_TTL = 3.0

_MORE = f"""
[tokens]
per_user = 0

[pools.gate]
capacity = 20
prefill = true
lease_ttl = 5
{LINES}
{POOLS % {"lease_ttl": LEASE_TTL}}
{USERS}
"""


class Nodes:
    """Two nodes, each with two workers, and HAProxy."""

    def __init__(self, directory: Path, hosts: Sequence[int], database: str) -> None:
        self.port = free_port()
        """The port of HAProxy."""
        self.servers: list[Server] = []
        """All that have been started; those that run are the last two."""
        self._ports = [free_port(), free_port()]
        self._directory = directory
        self._hosts = hosts
        self._database = database
        self._running = [ExitStack(), ExitStack()]

    def __enter__(self) -> "Nodes":
        self._directory.mkdir()
        for number in range(2):
            self._start(number)
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._running:
            node.close()

    def _start(self, number: int) -> None:
        own = self._directory / f"app{number + 1}"
        own.mkdir(exist_ok=True)
        hosts = "&".join(f"host=127.0.0.1:{port}" for port in self._hosts)
        text = replaced(
            "/etc/tokenauth/config.toml",
            {
                'host = "0.0.0.0"': 'host = "127.0.0.1"\naccept_risks = ["weak_hash"]',
                "port = 8000": f"port = {self._ports[number]}",
                "10.0.0.10": "127.0.0.1",
                "host=10.0.0.1:5432&host=10.0.0.2:5432&host=10.0.0.3:5432": hosts,
                "@/tokenauth?": f"@/{self._database}?",
            },
        )
        config = own / "config.toml"
        config.write_text(text + _MORE)
        config.chmod(0o600)
        server = self._running[number].enter_context(serve(config, env={"DATABASE_PASSWORD": PASSWORD}, on_port=False))
        self.servers.append(server)
        until(lambda: takes_connections(server.port), "the node accepts connections")

    def restart(self, number: int) -> None:
        """Restart a node with SIGTERM."""
        server = next(server for server in reversed(self.servers) if server.port == self._ports[number])
        assert server.stop() in {0, -signal.SIGTERM}
        self._running[number].close()
        self._start(number)

    def haproxy_config(self) -> str:
        return replaced(
            "/etc/haproxy/haproxy.cfg",
            {
                "10.0.0.10:80": f"127.0.0.1:{self.port}",
                "10.0.0.11:8000": f"127.0.0.1:{self._ports[0]}",
                "10.0.0.12:8000": f"127.0.0.1:{self._ports[1]}",
            },
        )


@contextmanager
def nodes(directory: Path, hosts: Sequence[int], database: str) -> Iterator[Nodes]:
    """Run two nodes and HAProxy. `hosts` are the ports of the database's machines."""
    haproxy = program("haproxy")
    with Nodes(directory, hosts, database) as running:
        file = directory / "haproxy.cfg"
        file.write_text(running.haproxy_config())
        with (directory / "haproxy.log").open("wb") as log:
            process = subprocess.Popen(
                [haproxy, "-db", "-f", str(file)],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            until(lambda: takes_connections(running.port), "HAProxy forwards requests")
            yield running
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
