"""Two workers on one database, one of them behind a network that a test breaks; and who asks it all the while."""

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
    """Two server processes on one database; between the second and the database is a network to break."""

    here: Server
    there: Server
    network: Proxy

    def until_quiet(self) -> None:
        """Wait until the second has its feed: as often as it was lost it has come back."""
        there = self.there
        until(
            lambda: len(there.events("revocation_feed_lost")) == len(there.events("revocation_feed_restored")),
            "the feed is back",
        )


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
class Asked:
    """What a server was asked about one token: when each question was sent, and what the answer was."""

    at: list[float] = field(default_factory=list)
    valid: list[bool | None] = field(default_factory=list)
    """None is 503: it is not known."""

    def last(self, answer: bool) -> float:
        """Say when the last question was sent that had this answer."""
        return max((at for at, valid in zip(self.at, self.valid, strict=True) if valid is answer), default=0)

    def first(self, answer: bool) -> float:
        """Say when the first question was sent that had this answer."""
        return min((at for at, valid in zip(self.at, self.valid, strict=True) if valid is answer), default=float("inf"))


class Watch:
    """Asks a server about tokens again and again, over several connections for each: while one waits, others ask."""

    def __init__(self, server: Server, tokens: Sequence[str], connections: int) -> None:
        self._port = server.port
        self.seen = {token: Asked() for token in tokens}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._troubles: list[BaseException] = []
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
        assert not any(thread.is_alive() for thread in self._threads), "an answer does not come"
        if self._troubles:
            raise self._troubles[0]

    def until_asked_after(self, instant: float) -> None:
        """Go on until each token was asked about after an instant, and answered."""
        while not self._troubles and not all(seen.at and max(seen.at) > instant for seen in self.seen.values()):
            time.sleep(0.005)

    def until_valid(self, token: str) -> None:
        """Ask until a token is taken."""
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
            self._troubles.append(error)

    def _ask(self, connection: Connection, token: str) -> bool | None:
        asked_at = time.monotonic()
        answer = connection.ask("GET", f"/api/token?token={token}")
        assert answer.status in {200, 503}, answer
        valid = bool(answer.json()["valid"]) if answer.status == 200 else None
        with self._lock:
            self.seen[token].at.append(asked_at)
            self.seen[token].valid.append(valid)
        return valid


def hold_to_the_promise(pair: Pair, watch: Watch, ended: dict[str, float], good: Sequence[str]) -> None:
    """Compare what was asked and answered with when each DELETE was answered.

    No slow machine can break this: what is asked later than BOUND after the answer is judged by what was read after it.
    """
    for value, ended_at in ended.items():
        seen = watch.seen[value]
        assert seen.last(answer=True) <= ended_at + BOUND, "valid for longer than the bound"
        assert max(seen.at) > ended_at + BOUND, "nobody asked"
    for value in good:
        assert False not in watch.seen[value].valid, "a good token was refused"
    assert pair.there.process.poll() is None


def sleep_through(pair: Pair, changes: Sequence[tuple[str, Callable[[], object]]], askers: int) -> list[bool]:
    """Stop the second worker, make a change to each token, and ask about it after the bound, before it goes on.

    Say of each token whether it was taken; all who ask must be told the same.
    """
    with ExitStack() as stack:
        connections = [stack.enter_context(Connection(pair.there.port)) for _ in range(askers)]
        for connection in connections:
            assert all(connection.valid(token) for token, _ in changes)
        os.kill(pair.there.process.pid, signal.SIGSTOP)
        try:
            for _, change in changes:
                change()
            time.sleep(BOUND)  # what is shown is a fact about time
            threads = stack.enter_context(ThreadPoolExecutor(askers))
            answers = [
                threads.submit(connection.valid, changes[number % len(changes)][0])
                for number, connection in enumerate(connections)
            ]
        finally:
            os.kill(pair.there.process.pid, signal.SIGCONT)
        told = [{answer.result() for answer in answers[number :: len(changes)]} for number in range(len(changes))]
    assert [len(each) for each in told] == [1] * len(changes), "some were told otherwise"
    return [each.pop() for each in told]
