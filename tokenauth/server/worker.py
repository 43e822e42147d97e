"""A worker process: serves the settings that the main process sends, until it receives Stop."""

import asyncio
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE
from uvicorn.lifespan.on import LifespanOn, LifespanSendMessage

from tokenauth import logs
from tokenauth.errors import ConfigError, Overloaded, StartError
from tokenauth.metrics import Snapshot
from tokenauth.revocation_queue import RevocationUpdate
from tokenauth.server import tls
from tokenauth.server.acceptor import CUT_OFF, AcceptingServer
from tokenauth.server.channel import (
    GRACE,
    HEARTBEAT,
    Alone,
    Applied,
    ChangeUsers,
    Channel,
    NodeAnswer,
    Report,
    Serve,
    Stop,
    decode_order,
    encode_report,
)
from tokenauth.server.protocol import DRAIN, BoundedProtocol
from tokenauth.settings import loader
from tokenauth.settings.model import ServerSettings
from tokenauth.status import NodeStatus

if TYPE_CHECKING:
    from tokenauth.gauges import Gauges
    from tokenauth.service import Service

KEEP_ALIVE = 75
"""Seconds before an idle connection is closed. nginx closes after 60 by default, so it is nginx that closes."""

_PATIENCE = 5.0
"""Seconds in which the main process must answer a question."""

_RETRY = 0.01
"""Seconds between two attempts to send the last reports of a worker."""


def uvicorn_options(
    app: Callable[[], ASGIApp], settings: ServerSettings, protocol: type[BoundedProtocol] = BoundedProtocol
) -> uvicorn.Config:
    """Return the options of the HTTP server. The benchmark's yardstick uses them as well."""
    return uvicorn.Config(
        app,
        factory=True,
        interface="asgi3",  # uvicorn cannot detect it: the outermost application is not a coroutine function
        host=settings.host,
        port=settings.port,
        workers=1,  # else uvicorn reads WEB_CONCURRENCY, and a wrong one would end the start
        loop="uvloop",
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE + CUT_OFF,
    )


def spawn_main(channel_fd: int, listener_fd: int, log_fd: int) -> None:
    """Run a worker: the main process starts a Python that calls this.

    Until the log is set up, standard error is a pipe to the main process, which logs why a Python could not start.
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
    except EOFError:  # the main process ended before it sent the settings
        return
    except (ConfigError, StartError) as error:
        _send(channel, Report("failed", str(error), isinstance(error, ConfigError)))
        sys.exit(STARTUP_FAILURE)
    except Exception as error:
        _send(channel, Report("failed", logs.describe(error)))
        sys.exit(1)


def _work(channel: Channel, listener: socket.socket) -> None:
    first, *others = channel.wait()
    order = decode_order(first)
    assert isinstance(order, Serve)
    from tokenauth.service import create_service
    from tokenauth.web.app import build_app  # here, so that the main process does not load it

    with loader.naming(order.path):
        service = create_service(order.settings, served=order.database)
        app = build_app(service)
    service.node.config_file = order.path
    service.tokens.revocations.apply(order.held)
    from tokenauth.gauges import Gauges

    gauges, protocol = Gauges(service, order.counts_store), BoundedProtocol
    if order.settings.metrics.listen:
        from tokenauth.server.metered_protocol import MeteredProtocol

        protocol = MeteredProtocol
    options = uvicorn_options(lambda: app, order.settings.server, protocol)
    server = WorkerServer(options, channel, service, gauges)
    options.ssl = None if order.certificate is None else tls.create_context(order.certificate)
    server.follow(others)
    server.run(sockets=[listener])


def _send(channel: Channel, report: Report) -> None:
    channel.send(encode_report(report))


class StatusQuestion:
    """The question to the main process how the node is doing: one for all requests that wait."""

    def __init__(self, send: Callable[[], None], patience: float = _PATIENCE) -> None:
        self._send = send
        self._patience = patience
        self._answer: asyncio.Future[NodeStatus] | None = None
        self._sent_at = -math.inf

    async def ask(self) -> NodeStatus:
        """Wait for an answer. Raises Overloaded."""
        loop, answer = asyncio.get_running_loop(), self._answer
        if answer is None or answer.done():
            answer, self._sent_at = loop.create_future(), -math.inf
            self._answer = answer
        if loop.time() >= self._sent_at + self._patience:  # it may have been lost
            self._sent_at = loop.time()
            self._send()
        try:
            async with asyncio.timeout(self._patience):
                return await asyncio.shield(answer)
        except TimeoutError:  # others may still wait for the same answer
            raise Overloaded("The main process does not answer. Try again shortly.") from None

    def answer(self, status: NodeStatus) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(status)


class WorkerServer(AcceptingServer):
    """uvicorn's server, which follows the orders of the main process and stops when that process is gone."""

    def __init__(self, options: uvicorn.Config, channel: Channel, service: "Service", gauges: "Gauges") -> None:
        """Create it. `gauges` are what the main process gets for metrics and for /api/status."""
        super().__init__(options)
        options.load()
        options.lifespan_class = _Lifespan
        self._channel = channel
        self._service = service
        self._revocations = service.tokens.revocations
        self._revocations.publish = self._publish
        self._gauges = gauges
        self._question = StatusQuestion(self._ask)
        service.node.ask = self._question.ask
        if service.audit is not None:
            service.audit.hand_over = self._hand_over_acts
        self._heartbeats: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Start, and report it. Raises StartError."""
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._receive)
        self._heartbeats = asyncio.create_task(self._send_heartbeats())
        try:
            await super().startup(sockets)
        except SystemExit:
            reason = self.lifespan.failure if isinstance(self.lifespan, _Lifespan) else ""
            raise StartError(reason or "the application did not start") from None
        _send(self._channel, Report("ready", database=self._service.store.identity, metrics=self._snapshot()))
        self._reading = asyncio.create_task(self._gauges.run())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop within GRACE: answer what was accepted, write held revocations, and send the last reports."""
        self._service.pools.waiting.stop()
        self._service.events.stop()
        self._revocations.close_deadline = asyncio.get_running_loop().time() + GRACE
        if self._reading is not None:
            self._reading.cancel()
        await super().shutdown(sockets)
        _send(self._channel, Report("alive", metrics=self._snapshot()))
        while self._channel.pending:
            self._channel.flush()
            await asyncio.sleep(_RETRY)

    async def drain(self) -> None:
        """Report when this worker takes no more requests: then a reload is complete."""
        await super().drain()
        idle = any(cast(BoundedProtocol, each).idle for each in self.server_state.connections)
        loop = asyncio.get_running_loop()
        loop.call_later(DRAIN + _RETRY if idle else 0, _send, self._channel, Report("alive", drained=True))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGTERM, as after the order Stop. Other signals go to the main process."""
        signal.signal(signal.SIGTERM, self.handle_exit)
        yield

    def follow(self, orders: list[bytes]) -> None:
        for order in map(decode_order, orders):
            if isinstance(order, ChangeUsers):
                self._service.change_users(order.removed, order.changed)
            elif isinstance(order, RevocationUpdate):
                self._revocations.apply(order)
                if order.number:  # answered when no request of this iteration can use the cache as it was
                    asyncio.get_running_loop().call_soon(_send, self._channel, Report("alive", applied=order.number))
            elif isinstance(order, Applied):
                self._revocations.answered(order.number)
            elif isinstance(order, Alone):
                self._revocations.alone = order.alone
            elif isinstance(order, NodeAnswer):
                self._question.answer(order.status)
            elif isinstance(order, Stop):
                self._revocations.handed_over = order.replaced
                self._stop()

    def _receive(self) -> None:
        try:
            self.follow(self._channel.receive())
        except EOFError:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._revocations.publish, self._revocations.handed_over = None, False
            if self._service.audit is not None:
                self._service.audit.hand_over = None
            self._stop()

    def _snapshot(self) -> Snapshot | None:
        """Return what metrics show of this worker; None while it starts."""
        return self._gauges.snapshot() if self.started else None

    def _ask(self) -> None:
        _send(self._channel, Report("alive", asks=True, metrics=self._snapshot()))

    def _hand_over_acts(self, records: Sequence[bytes]) -> None:
        _send(self._channel, Report("alive", acts=records))

    def _publish(self, update: RevocationUpdate) -> None:
        _send(self._channel, Report("alive", revocations=update))

    def _stop(self) -> None:
        if not self.started:  # a start may take long, and no connection has been accepted yet
            os._exit(0)
        self.should_exit = True

    async def _send_heartbeats(self) -> None:
        while True:
            if self._channel.pending:  # the main process does not read: one heartbeat is enough
                self._channel.flush()
            else:
                database = self._service.store.identity if self.started else None
                _send(self._channel, Report("alive", database=database, metrics=self._snapshot()))
            await asyncio.sleep(HEARTBEAT)


_SILENT = logging.Logger("silent", logging.CRITICAL + 1)


class _Lifespan(LifespanOn):
    """Keeps the reason why the application did not start. The main process logs it, so uvicorn does not."""

    failure = ""

    async def send(self, message: LifespanSendMessage) -> None:
        if message["type"] == "lifespan.startup.failed":
            self.failure, message["message"] = message.get("message", ""), ""
            self.logger = _SILENT  # uvicorn logs one more line, without the reason
        await super().send(message)
