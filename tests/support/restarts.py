"""Reloads and restarts of `tokenauth serve` under load, with clients that come back."""

import signal
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tests.support.connections import Closed, Connection, NoAnswer, Refused, takes_connections
from tests.support.journal import Client, Journal, check_file, check_servers, serving, until
from tests.support.ports import free_port
from tests.support.servers import Server, serve, write_config

PER_USER = "[tokens]\nper_user = 0\n"


class Returning(Client):
    """A client that connects again when its connection was closed between two requests."""

    def __init__(self, port: int, journal: Journal, seed: int) -> None:
        super().__init__([port], journal, seed)
        self.lost = 0
        """Requests that were sent and not answered."""
        self.refused = 0
        """Connections that failed."""

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self._visit()
        except BaseException as error:
            self.error = error

    def _visit(self) -> None:
        """Send requests over one connection until it ends; about one connection in twenty has one request only."""
        try:
            with closing(Connection(self._ports[0])) as connection:
                once = self._random.random() < 0.05
                while not self.stopping.is_set():
                    self._step(connection)
                    if once:
                        return
        except Closed:
            pass
        except Refused:
            self.refused += 1
            self.stopping.wait(0.01)
        except NoAnswer:
            self.lost += 1


def visit(port: int, count: int) -> list[Returning]:
    """Start clients of a server."""
    clients = [Returning(port, Journal(), number) for number in range(count)]
    for client in clients:
        client.start()
    return clients


def leave(clients: Sequence[Returning], directory: Path) -> None:
    """Stop the clients. Check that no request was lost, and that the database agrees with all answers."""
    for client in clients:
        client.finish()
    assert sum(client.lost for client in clients) == 0, "a request was sent and not answered"
    journals = [client._journal for client in clients]
    with serving(directory / "config.toml") as server:
        check_servers([server], journals)
    check_file(directory / "tokenauth.db", journals)


def answered(clients: Sequence[Returning]) -> int:
    """Return the number of tokens that were issued. Raises the error of a client that failed."""
    for client in clients:
        if client.error is not None:
            raise client.error
    return sum(len(client._journal.issued) for client in clients)


def survive_reloads(directory: Path, count: int, clients: int = 4) -> None:
    """Reload a server under load. No connection is refused, and no request is lost."""
    with serving(write_config(directory, PER_USER), "--workers", "2") as server:
        crowd = visit(server.port, clients)
        try:
            for number in range(count):
                before = answered(crowd)
                until(lambda: answered(crowd) > before + clients, "the clients are busy")  # noqa: B023
                server.process.send_signal(signal.SIGHUP)
                until(lambda: _reloads(server) > number, "it is reloaded")  # noqa: B023
            server.stop()
        finally:
            for client in crowd:
                client.stopping.set()
        assert server.errors() == [], server.errors()
    leave(crowd, directory)


def _reloads(server: Server) -> int:
    return len(server.events("reloaded"))


def survive_restarts(directory: Path, count: int, clients: int = 4) -> None:
    """Stop and start a server under load, always on the same port. Requests that were sent are answered."""
    port = free_port()
    config = write_config(directory, f"[server]\nport = {port}\nworkers = 2\n{PER_USER}")
    crowd = visit(port, clients)
    try:
        for _ in range(count):
            with serve(config, on_port=False) as server:
                until(lambda: takes_connections(port), "the server accepts connections")
                before = answered(crowd)
                until(lambda: answered(crowd) > before + clients, "the clients are busy")  # noqa: B023
                assert server.stop() == 0
                assert server.errors() == [], server.errors()
                server.log.unlink()
    finally:
        for client in crowd:
            client.stopping.set()
    assert sum(client.refused for client in crowd) > 0, "the port was never closed"
    leave(crowd, directory)
