"""A worker process: serves the configuration that the main process hands to it, until it is told to stop."""

import asyncio
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.lifespan.on import LifespanOn, LifespanSendMessage

from tokenauth import logs
from tokenauth.errors import ConfigError, StartError
from tokenauth.models import User
from tokenauth.revocation_queue import RevocationUpdate
from tokenauth.server.acceptor import AcceptingServer
from tokenauth.server.channel import Channel
from tokenauth.server.protocol import BoundedProtocol
from tokenauth.settings import loader
from tokenauth.settings.model import ServerSettings, Settings

if TYPE_CHECKING:
    from tokenauth.service import Service

KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: longer than the 60 of nginx, so that nginx closes it."""

GRACE = 30
"""Seconds that requests under way are given when a worker stops."""

BEAT = 1.0
"""Seconds between two signs of life of a worker."""

_PAUSE = 0.01
"""Seconds between two attempts to send the last that a worker has to say."""


class Serve(NamedTuple):
    """The first message to a worker: serve this configuration, which was read from `path`."""

    path: Path
    settings: Settings
    held: RevocationUpdate


class ChangeUsers(NamedTuple):
    """A message to a worker that will be replaced: what a new configuration has other than the users so far."""

    removed: Sequence[str]
    changed: Mapping[str, User]


class Stop(NamedTuple):
    """The last message to a worker: take no more connections, answer what was accepted, and end."""

    replaced: bool
    """Whether other workers go on, and with them the attempts to write what is held."""


Order = Serve | ChangeUsers | RevocationUpdate | Stop


class Report(msgspec.Struct, omit_defaults=True):
    """What a worker says of itself, and why it failed."""

    state: Literal["alive", "ready", "failed"]
    reason: str = ""
    configuration: bool = False
    """Whether the configuration is the reason."""
    revocations: RevocationUpdate | None = None


def encode(order: Order) -> bytes:
    """Write an order for a worker, which is as trusted as the main process itself."""
    return pickle.dumps(order)


def uvicorn_options(app: Callable[[], ASGIApp], settings: ServerSettings) -> uvicorn.Config:
    """Set up the HTTP server under the application; the benchmark's yardstick runs on the same."""
    return uvicorn.Config(
        app,
        factory=True,
        interface="asgi3",  # uvicorn would not see it: what answers at once is no coroutine function
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
    )


def spawn_main(channel_fd: int, listener_fd: int, log_fd: int) -> None:
    """Run a worker: the main process starts a Python that calls this.

    Until here, standard error is a pipe to the main process, so that a Python that cannot even start is one line in
    the log as well.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C and a closed terminal concern the main process
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGTERM})
    channel = Channel(socket.socket(fileno=channel_fd))
    try:
        os.dup2(log_fd, 2)
        os.close(log_fd)
        logs.configure()
        _work(channel, socket.socket(fileno=listener_fd))
    except EOFError:  # the main process has ended before it said what to serve
        return
    except (ConfigError, StartError) as error:
        _report(channel, Report("failed", str(error), isinstance(error, ConfigError)))
        sys.exit(uvicorn.config.STARTUP_FAILURE)
    except Exception as error:
        _report(channel, Report("failed", logs.describe(error)))
        sys.exit(1)


def _work(channel: Channel, listener: socket.socket) -> None:
    first, *others = channel.wait()
    order = pickle.loads(first)  # noqa: S301  (from the main process, over a socket that only the two have)
    from tokenauth.service import create_service
    from tokenauth.web.app import build_app  # the main process has no need of it

    with loader.naming(order.path):
        service = create_service(order.settings)
        app = build_app(service)
    service.tokens.queue.apply(order.held)
    server = Server(uvicorn_options(lambda: app, order.settings.server), channel, service)
    server.obey(others)
    server.run(sockets=[listener])


def _report(channel: Channel, report: Report) -> None:
    channel.send(msgspec.msgpack.encode(report))


class Server(AcceptingServer):
    """uvicorn's server, which obeys the main process, and stops when that is gone."""

    def __init__(self, options: uvicorn.Config, channel: Channel, service: "Service") -> None:
        super().__init__(options)
        options.load()
        options.lifespan_class = _Lifespan
        self._channel = channel
        self._service = service
        self._queue = service.tokens.queue
        self._queue.publish = self._publish
        self._beating: asyncio.Task[None] | None = None

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Start, and say so. Raises StartError."""
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._hear)
        self._beating = asyncio.create_task(self._beat())
        try:
            await super().startup(sockets)
        except SystemExit:
            reason = self.lifespan.failure if isinstance(self.lifespan, _Lifespan) else ""
            raise StartError(reason or "the application did not start") from None
        _report(self._channel, Report("ready"))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop, with GRACE for requests and for what is held; what this worker has to say arrives."""
        self._queue.close_deadline = asyncio.get_running_loop().time() + GRACE
        await super().shutdown(sockets)
        while self._channel.pending:
            self._channel.flush()
            await asyncio.sleep(_PAUSE)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGTERM, as after `Stop`; the main process hears of all other signals."""
        signal.signal(signal.SIGTERM, self.handle_exit)
        yield

    def obey(self, orders: list[bytes]) -> None:
        """Do what the main process says."""
        for encoded in orders:
            order: Order = pickle.loads(encoded)  # noqa: S301  (as above)
            if isinstance(order, ChangeUsers):
                self._service.change_users(order.removed, order.changed)
            elif isinstance(order, RevocationUpdate):
                self._queue.apply(order)
            elif isinstance(order, Stop):
                self._queue.handed_over = order.replaced
                self._stop()

    def _hear(self) -> None:
        try:
            self.obey(self._channel.receive())
        except EOFError:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._queue.publish, self._queue.handed_over = None, False
            self._stop()

    def _publish(self, update: RevocationUpdate) -> None:
        _report(self._channel, Report("alive", revocations=update))

    def _stop(self) -> None:
        if not self.started:  # a start may take long, and nothing was accepted yet
            os._exit(0)
        self.should_exit = True

    async def _beat(self) -> None:
        while True:
            if self._channel.pending:  # the main process does not read: one sign of life is enough
                self._channel.flush()
            else:
                _report(self._channel, Report("alive"))
            await asyncio.sleep(BEAT)


class _Lifespan(LifespanOn):
    """Keeps the reason for which the application did not start, instead of logging it: the main process does."""

    failure = ""

    async def send(self, message: LifespanSendMessage) -> None:
        """Take a message of the application."""
        if message["type"] == "lifespan.startup.failed":
            self.failure, message["message"] = message.get("message", ""), ""
        await super().send(message)
