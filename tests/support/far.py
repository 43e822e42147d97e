"""A service whose database is far away: what its operations cost in round trips, and how long they take."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from tests.support.servers import log_in
from tests.support.tcp_proxy import Proxy

TABLES = """
[tokens]
idle = "1h"
[pools.permits]
capacity = 1000
prefill = true
lease_ttl = "1h"
"""
"""The settings that the operations need."""

_LEASES = "/api/pools/permits/leases"


@dataclass
class Far:
    """A server with one worker, the proxy between it and its database, and a user."""

    proxy: Proxy
    client: httpx.Client
    username: str
    password: str

    def __post_init__(self) -> None:
        self.token = self.log_in()

    def round_trips(self, operation: Callable[[], object]) -> int:
        """Run an operation and count the round trips to the database meanwhile, also those of other tasks."""
        before = self._total()
        operation()
        return self._total() - before

    def _total(self) -> int:
        return sum(each.round_trips for each in self.proxy.connections if not each.listens)

    def log_in(self) -> str:
        return log_in(self.client, self.username, self.password)

    def lease(self, **terms: Any) -> str:
        return str(self.ask("POST", _LEASES, 201, json={"holder": "job", **terms}).json()["token"])

    def end_lease(self, lease: str) -> None:
        self.ask("DELETE", f"{_LEASES}/{lease}", 204)

    def keep_alive(self, lease: str) -> None:
        self.ask("PUT", f"{_LEASES}/{lease}", 200)

    def ask(self, method: str, path: str, status: int, token: str = "", **options: Any) -> httpx.Response:
        answer = self.client.request(method, path, headers={"X-Token": token or self.token}, **options)
        if answer.status_code != status:
            raise RuntimeError(f"{method} {path} answered {answer.status_code}: {answer.text}")
        return answer


Prepare = Callable[[Far], Callable[[], object]]
"""Does what an operation needs, and returns the operation."""


def _with_token(method: str, path: str) -> Prepare:
    def prepare(far: Far) -> Callable[[], object]:
        token = far.log_in()
        return lambda: far.ask(method, path, 200, token)

    return prepare


def _with_lease(operation: Callable[[Far, str], object]) -> Prepare:
    def prepare(far: Far) -> Callable[[], object]:
        lease = far.lease()
        return lambda: operation(far, lease)

    return prepare


OPERATIONS: Mapping[str, Prepare] = {
    "log in": lambda far: far.log_in,
    "check a token for the first time": _with_token("GET", "/api/token"),
    "check a token again": lambda far: lambda: far.ask("GET", "/api/token", 200),
    "renew": _with_token("POST", "/api/token/renew"),
    "log out": _with_token("DELETE", "/api/token"),
    "lease": lambda far: far.lease,
    "lease, and be ready to wait": lambda far: lambda: far.lease(wait=1),
    "keep a lease alive": _with_lease(Far.keep_alive),
    "release": _with_lease(Far.end_lease),
}
"""Operations by name. Each can be prepared again and again."""


def seconds(operation: Callable[[], object]) -> float:
    """Return how long an operation takes."""
    began = time.perf_counter()
    operation()
    return time.perf_counter() - began
