"""Two workers on one database, one of them behind a proxy that a test breaks, and clients that poll it."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.support.connections import Connection
from tests.support.journal import until
from tests.support.postgres import Cluster
from tests.support.servers import USERS, Server, worker
from tests.support.tcp_proxy import Proxy
from tokenauth.stores.postgres.listener import BOUND


class Pair(NamedTuple):
    """Two server processes on one database. The second connects through a proxy."""

    here: Server
    there: Server
    network: Proxy

    def until_quiet(self) -> None:
        """Wait until the second has its feed back, after each time that it was lost, and reads the database again."""
        there = self.there
        until(
            lambda: len(there.events("revocation_feed_lost")) == len(there.events("revocation_feed_restored")),
            "the feed is back",
        )
        with Connection(there.port) as connection:
            until(lambda: connection.ask("GET", "/readyz").status == 200, "the database is read")


@contextmanager
def pair(postgres: Cluster, name: str, directory: Path) -> Iterator[Pair]:
    """Run two workers on a database."""
    with ExitStack() as stack:
        network = stack.enter_context(Proxy(postgres.port))
        servers = []
        for port in (postgres.port, network.port):
            own = directory / str(port)
            own.mkdir()
            config = own / "config.toml"
            config.write_text(f'[database]\nurl = "{postgres.url(name, port)}"\n[tokens]\nper_user = 0\n{USERS}')
            servers.append(stack.enter_context(worker(config)))
        yield Pair(servers[0], servers[1], network)


@dataclass
class Probes:
    """The probes of one token: when each was sent, and its answer."""

    at: list[float] = field(default_factory=list)
    valid: list[bool | None] = field(default_factory=list)
    """None is a 503."""

    def last(self, answer: bool) -> float:
        """Return when the last probe with this answer was sent."""
        return max((at for at, valid in zip(self.at, self.valid, strict=True) if valid is answer), default=0)

    def first(self, answer: bool) -> float:
        """Return when the first probe with this answer was sent."""
        return min((at for at, valid in zip(self.at, self.valid, strict=True) if valid is answer), default=float("inf"))


class Watch:
    """Probes tokens continuously, over several connections for each, so that a slow answer delays no other probe."""

    def __init__(self, server: Server, tokens: Sequence[str], connections: int) -> None:
        self._port = server.port
        self.seen = {token: Probes() for token in tokens}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._errors: list[BaseException] = []
        each = list(self.seen) * connections
        self._threads = [threading.Thread(target=self._run, args=[token], daemon=True) for token in each]

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self._threads), "a probe gets no answer"
        if self._errors:
            raise self._errors[0]

    def until_asked_after(self, instant: float) -> None:
        """Wait until each token was probed after an instant, and the probe answered."""
        while not self._errors and not all(seen.at and max(seen.at) > instant for seen in self.seen.values()):
            time.sleep(0.005)

    def until_valid(self, token: str) -> None:
        """Probe until the token is accepted."""
        with Connection(self._port) as connection:
            while self._ask(connection, token) is not True:
                time.sleep(0.01)

    def _run(self, token: str) -> None:
        try:
            with Connection(self._port) as connection:
                while not self._stopping.is_set():
                    self._ask(connection, token)
                    time.sleep(0.002)
        except BaseException as error:
            self._errors.append(error)

    def _ask(self, connection: Connection, token: str) -> bool | None:
        asked_at = time.monotonic()
        answer = connection.ask("GET", f"/api/token?token={token}")
        assert answer.status in {200, 503}, answer
        valid = bool(answer.json()["valid"]) if answer.status == 200 else None
        with self._lock:
            self.seen[token].at.append(asked_at)
            self.seen[token].valid.append(valid)
        return valid


def check_promise(pair: Pair, watch: Watch, ended: dict[str, float], good: Sequence[str]) -> None:
    """Check that no probe sent later than BOUND after a token's revocation was answered with valid.

    Slow machines do not break this check: it uses the time when a probe was sent.
    """
    for value, ended_at in ended.items():
        seen = watch.seen[value]
        assert seen.last(answer=True) <= ended_at + BOUND, "accepted for longer than the bound"
        assert max(seen.at) > ended_at + BOUND, "no probe after the bound"
    for value in good:
        assert False not in watch.seen[value].valid, "a valid token was refused"
    assert pair.there.process.poll() is None


def _judgement(connection: Connection, token: str) -> bool:
    """Probe a token until there is an answer about it: on a busy machine the database first seems to be too slow."""
    while (answer := connection.ask("GET", f"/api/token?token={token}")).status == 503:
        time.sleep(0.05)
    assert answer.status == 200, answer
    return bool(answer.json()["valid"])


def sleep_through(pair: Pair, changes: Sequence[tuple[str, Callable[[], object]]], clients: int) -> list[bool]:
    """Suspend the second worker, make a change to each token, and send probes after the bound, before it resumes.

    Return, for each token, whether it was accepted. All probes of a token must have the same answer.
    """
    with ExitStack() as stack:
        connections = [stack.enter_context(Connection(pair.there.port)) for _ in range(clients)]
        for connection in connections:
            assert all(_judgement(connection, token) for token, _ in changes)
        os.kill(pair.there.process.pid, signal.SIGSTOP)
        try:
            for _, change in changes:
                change()
            time.sleep(BOUND)  # the test is about real time
            threads = stack.enter_context(ThreadPoolExecutor(clients))
            answers = [
                threads.submit(_judgement, connection, changes[number % len(changes)][0])
                for number, connection in enumerate(connections)
            ]
        finally:
            os.kill(pair.there.process.pid, signal.SIGCONT)
        seen = [{answer.result() for answer in answers[number :: len(changes)]} for number in range(len(changes))]
    assert [len(each) for each in seen] == [1] * len(changes), "the answers differ"
    return [each.pop() for each in seen]
