"""How many round trips to PostgreSQL each operation takes: in a far region, they are what it costs.

The operations are HTTP requests to a worker. A proxy counts how often it sends something and waits for the answer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.support.postgres import Cluster
from tests.support.servers import log_in, worker
from tests.support.tcp_proxy import Proxy
from tests.system.postgres.nodes import fresh, write_config_for

SETTINGS = """
[pools.permits]
capacity = 50
prefill = true
"""

TRIES = 6

LEASES = "/api/pools/permits/leases"


@dataclass
class Far:
    """A worker, and the proxy between it and its database."""

    proxy: Proxy
    client: httpx.Client
    token: str

    def cost(self, operation: Callable[[], object]) -> int:
        """Return the round trips of an operation: the fewest of some attempts, since other tasks cause more."""
        return min(self._count(operation) for _ in range(TRIES))

    def _count(self, operation: Callable[[], object]) -> int:
        before = self._total()
        operation()
        return self._total() - before

    def _total(self) -> int:
        return sum(each.round_trips for each in self.proxy.connections if not each.listens)

    def log_in(self) -> str:
        return log_in(self.client)

    def log_out(self) -> Callable[[], object]:
        tokens = [self.log_in() for _ in range(TRIES)]
        return lambda: self.ask("DELETE", "/api/token", 200, tokens.pop())

    def lease(self) -> str:
        return str(self.ask("POST", LEASES, 201, json={"holder": "job"}).json()["token"])

    def keep_alive(self) -> Callable[[], object]:
        lease = self.lease()
        return lambda: self.ask("PUT", f"{LEASES}/{lease}", 200)

    def release(self) -> Callable[[], object]:
        leases = [self.lease() for _ in range(TRIES)]
        return lambda: self.ask("DELETE", f"{LEASES}/{leases.pop()}", 204)

    def ask(self, method: str, path: str, status: int, token: str = "", **options: Any) -> httpx.Response:
        answer = self.client.request(method, path, headers={"X-Token": token or self.token}, **options)
        assert answer.status_code == status, answer.text
        return answer


@pytest.fixture(scope="module")
def far(postgres: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    """Run a worker with a proxy before its database."""
    with fresh(postgres) as url, Proxy(postgres.port) as proxy:
        through = url.replace(f":{postgres.port}/", f":{proxy.port}/")
        config = write_config_for(through, tmp_path_factory.mktemp("far"), SETTINGS)
        with worker(config) as server, server.client() as client:
            yield Far(proxy, client, log_in(client))


def test_a_login_takes_2_round_trips(far: Far) -> None:
    """One reads the failed logins before."""
    assert far.cost(far.log_in) == 2


def test_a_log_out_takes_2_round_trips(far: Far) -> None:
    """One reads whose token it is, for the logs."""
    assert far.cost(far.log_out()) == 2


def test_a_lease_takes_1_round_trip(far: Far) -> None:
    assert far.cost(far.lease) == 1


def test_a_keep_alive_takes_2_round_trips(far: Far) -> None:
    assert far.cost(far.keep_alive()) == 2


def test_a_release_takes_2_round_trips(far: Far) -> None:
    assert far.cost(far.release()) == 2
