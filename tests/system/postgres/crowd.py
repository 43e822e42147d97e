"""Clients that keep sending requests to workers while PostgreSQL fails, and record every wrong answer."""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from time import monotonic
from typing import NamedTuple

from tests.support.connections import LOGIN, Answer, Closed, Connection
from tests.support.journal import until
from tests.support.servers import HandClock, Server, worker, write_config
from tokenauth import values
from tokenauth.models import public_id
from tokenauth.stores.postgres.listener import BOUND

POOL = """
[tokens]
per_user = 0

[pools.permits]
capacity = 20
prefill = true
lease_ttl = 5
"""

KINDS = ("login", "probe", "log-out", "assign", "keep", "release")

_REFUSALS: Mapping[str, Mapping[int, str]] = {
    "assign": {409: "no_free_token"},
    "keep": {409: "lease_lost"},
    "release": {409: "lease_lost"},
}
"""The allowed refusals."""


def postgres_config(directory: Path, url: str, more: str = "", connections: int | None = None) -> Path:
    """Write a configuration whose database is in PostgreSQL."""
    path = write_config(directory, more)
    lines = [f'url = "{url}"', *([] if connections is None else [f"connections = {connections}"])]
    table, _, rest = path.read_text().partition("\n")
    path.write_text("\n".join([table, *lines, rest.partition("\n")[2]]))
    return path


@contextmanager
def two_workers(config: Path, clock: HandClock | None = None) -> Iterator[list[Server]]:
    """Run two workers. At the end, check that they logged no unexpected error."""
    with worker(config, clock) as one, worker(config, clock) as other:
        yield [one, other]
        for server in (one, other):
            check_log(server)


def check_log(server: Server) -> None:
    """Check that a log has no traceback and no unexpected error."""
    text = server.log.read_text()
    assert "Traceback" not in text, text
    assert not server.events("unexpected_error"), server.events("unexpected_error")
    assert all(line.startswith("{") for line in text.splitlines()), text


def is_outage(answer: Answer) -> bool:
    """Whether this is the answer to an outage of the store, in the form that promise 4 states."""
    if answer.status != 503:
        return False
    assert int(answer.headers["retry-after"]) >= 1, answer
    assert answer.json()["error"] == "store_unavailable", answer
    return True


class Seen(NamedTuple):
    """One answer: the kind of request, the worker's port, when it was sent and answered, and the status."""

    kind: str
    port: int
    sent: float
    at: float
    status: int


class Ended(NamedTuple):
    """When a token's log-out was answered, and by which worker."""

    at: float
    port: int


class Crowd:
    """Many concurrent clients, each with a connection to every worker. A request without an answer is a fault."""

    def __init__(
        self,
        servers: Sequence[Server],
        seed: int = 1,
        balancer: int | None = None,
        pool: str = "permits",
        pace: float = 100,
    ) -> None:
        """balancer: the port to which all requests go instead. pace: the requests of one client in a second."""
        self._servers = servers
        self.ports = [server.port for server in servers] if balancer is None else [balancer]
        self.direct = balancer is None
        self.pool = pool
        self.pace = pace
        self._seed = seed
        self._stopping = threading.Event()
        self.seen: list[Seen] = []
        self.faults: list[str] = []
        self.live: dict[str, None] = {}
        self.ended: dict[str, Ended] = {}
        self.late: list[tuple[str, Ended, float]] = []
        """Tokens that one worker accepted after the other had ended them, and how many seconds later."""

    def count(self, status: int) -> int:
        """Count the answers with a status."""
        return sum(seen.status == status for seen in list(self.seen))

    @contextmanager
    def running(self, count: int) -> Iterator[None]:
        """Run `count` clients. Fails at the end if an answer was wrong."""
        threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in threads:
                thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a client hangs"
        assert not self.faults, "\n".join(self.faults[:9])

    def busy(self, answers: int = 100) -> None:
        """Wait for this many more answers."""
        before = len(self.seen)
        until(lambda: len(self.seen) >= before + answers or bool(self.faults), "the clients are answered", 60)

    def resumed(self, since: float) -> float:
        """Wait until each kind of request has succeeded at each worker. Return the seconds that this took."""
        wanted = {(kind, port) for kind in KINDS for port in self.ports}

        def first() -> dict[tuple[str, int], float]:
            done: dict[tuple[str, int], float] = {}
            for seen in list(self.seen):
                if seen.status < 300 and seen.at > since:
                    done.setdefault((seen.kind, seen.port), seen.at - since)
            return done

        until(lambda: wanted <= first().keys() or bool(self.faults), "every kind of request succeeds again", 60)
        return max(first().values(), default=0)

    def check(self, more: Sequence[Server] = ()) -> None:
        """Check that all workers accept the issued tokens and refuse the ended ones."""
        held = {event["id"] for server in self._servers for event in server.events("revocation_held_in_memory")}
        for token, ended, late in self.late:
            assert _id(token) in held, f"accepted {late:.3f} s after {ended.port} had ended it"
        with ExitStack() as stack:
            connections = [stack.enter_context(_Reconnecting(server.port)) for server in (*self._servers, *more)]
            until(lambda: self._settled(connections), "the queued revocations are written")
            for connection in connections:
                assert all(map(connection.valid, self.live)), "an issued token was lost"
                assert not any(map(connection.valid, self.ended)), "a revocation was lost"

    def _settled(self, connections: Sequence[Connection]) -> bool:
        return not any(connection.valid(token) for token in self.ended for connection in connections)

    def _run(self, number: int) -> None:
        try:
            with ExitStack() as stack:
                connections = {port: _Reconnecting(port) for port in self.ports}
                for connection in connections.values():
                    stack.enter_context(connection)
                _Client(self, connections, Random(f"{self._seed} {number}")).work(self._stopping)
        except BaseException as error:
            self.faults.append(f"{type(error).__name__}: {error}")


class _Reconnecting(Connection):
    """A connection that reconnects if the server closed it while idle."""

    def __init__(self, port: int) -> None:
        super().__init__(port, 60)
        self._port = port

    def send(self, request: bytes) -> Answer:
        """Send a request and read its answer. Raises NoAnswer."""
        try:
            return super().send(request)
        except Closed:
            self.close()
            super().__init__(self._port, 60)
            return super().send(request)


class _Client:
    """Logs in, probes, logs out, leases and releases at random."""

    def __init__(self, crowd: Crowd, connections: Mapping[int, Connection], chance: Random) -> None:
        self._crowd = crowd
        self._connections = connections
        self._chance = chance
        self._login = ""
        self._mine: list[str] = []
        self._logged_out: list[str] = []
        self._lease: tuple[str, int] | None = None

    def work(self, stopping: threading.Event) -> None:
        """Send requests until stopped."""
        while not stopping.is_set():
            choice = self._chance.random()
            if choice < 0.2 or not self._login:
                self._log_in()
            elif choice < 0.45 and self._mine:
                self._probe(self._chance.choice(self._mine[-50:]))
            elif choice < 0.6 and self._logged_out:
                self._probe_ended(self._chance.choice(self._logged_out[-20:]))
            elif choice < 0.75 and self._mine:
                self._log_out(self._mine.pop(self._chance.randrange(len(self._mine))))
            else:
                self._use_pool()
            stopping.wait(self._chance.expovariate(self._crowd.pace))

    def _ask(self, kind: str, method: str, target: str, document: object = None, **headers: str) -> tuple[int, Answer]:
        """Send a request to a random worker. Return its port and the answer."""
        port = self._chance.choice(list(self._connections))
        sent = monotonic()
        answer = self._connections[port].ask(method, target, document, **headers)
        allowed = _REFUSALS.get(kind, {})
        if not (answer.status < 300 or is_outage(answer)):
            assert allowed.get(answer.status) == answer.json()["error"], (kind, answer)
        self._crowd.seen.append(Seen(kind, port, sent, monotonic(), answer.status))
        return port, answer

    def _log_in(self) -> None:
        _, answer = self._ask("login", "POST", "/api/token", LOGIN)
        if answer.status == 200:
            token = answer.json()["token"]
            self._crowd.live[token] = None
            if self._login:
                self._mine.append(token)
            else:
                self._login = token

    def _probe(self, token: str) -> None:
        _, answer = self._ask("probe", "GET", f"/api/token?token={token}")
        assert answer.status == 503 or answer.json()["valid"] is True, "a valid token was refused"

    def _probe_ended(self, token: str) -> None:
        sent, ended = monotonic(), self._crowd.ended[token]
        port, answer = self._ask("probe", "GET", f"/api/token?token={token}")
        if answer.status == 200 and answer.json()["valid"]:
            assert not (self._crowd.direct and port == ended.port), "accepted by the worker that had ended it"
            if sent - ended.at > BOUND:
                self._crowd.late.append((token, ended, sent - ended.at))

    def _log_out(self, token: str) -> None:
        del self._crowd.live[token]
        port, answer = self._ask("log-out", "DELETE", "/api/token", {"token": token})
        assert answer.status == 200, answer  # also if the revocation is queued in memory
        self._crowd.ended[token] = Ended(monotonic(), port)
        self._logged_out.append(token)

    def _use_pool(self) -> None:
        path = f"/api/pools/{self._crowd.pool}/leases"
        if self._lease is None:
            _, answer = self._ask("assign", "POST", path, X_Token=self._login)
            if answer.status == 201:
                self._lease = answer.json()["token"], answer.json()["fence"]
            return
        token, fence = self._lease
        kind, method = self._chance.choice([("keep", "PUT"), ("release", "DELETE")])
        _, answer = self._ask(kind, method, f"{path}/{token}", {"fence": fence}, X_Token=self._login)
        if kind == "release" or answer.status == 409:
            self._lease = None


def _id(token: str) -> str:
    digest = values.digest(token.encode())
    assert digest is not None
    return public_id(digest)


def statuses(crowd: Crowd) -> Mapping[str, Mapping[int, int]]:
    """Count the answers by kind and status."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for seen in crowd.seen:
        counts[seen.kind][seen.status] += 1
    return {kind: dict(count) for kind, count in counts.items()}
