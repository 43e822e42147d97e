"""A worker like those of `tokenauth serve`, with a clock in a file: `python -m tests.support.worker CONFIG CLOCK`.

A variable EVENTS has times of `tokenauth.event_streams` to use instead of its own, as JSON; AUTOCHECKPOINT the pages of
the write-ahead log after which it is copied into the database. With PATIENT it waits long for a busy database.
"""

import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from tests.support.servers import HandClock
from tokenauth import event_streams, logs
from tokenauth.logs import log
from tokenauth.server.acceptor import AcceptingServer
from tokenauth.server.protocol import BoundedProtocol
from tokenauth.server.worker import KEEP_ALIVE
from tokenauth.service import create_service
from tokenauth.settings import loader
from tokenauth.stores.sqlite import writer
from tokenauth.web.app import build_app


class Worker(AcceptingServer):
    """A worker that logs its port."""

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Start, then log the port."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        await super().startup([listener])
        log.info("test_worker_ready", port=listener.getsockname()[1])


def _be_patient() -> None:
    """Import what other workers do not need, and use it."""
    import pytest  # noqa: PLC0415

    from tests.support.patience import be_patient  # noqa: PLC0415

    be_patient(pytest.MonkeyPatch())


def main() -> None:
    """Serve until SIGTERM."""
    config_file, clock_file = sys.argv[1:]
    vars(event_streams).update(json.loads(os.environ.get("EVENTS", "{}")))
    if "AUTOCHECKPOINT" in os.environ:
        writer._PRAGMAS = (*writer._PRAGMAS, f"wal_autocheckpoint = {os.environ['AUTOCHECKPOINT']}")  # type: ignore[assignment]
    if "PATIENT" in os.environ:
        _be_patient()
    logs.configure(direct=True)  # tests read the log right after an answer
    settings = loader.load(Path(config_file))
    if clock_file == "-":
        service = create_service(settings)
    else:
        service = create_service(settings, clock=HandClock(Path(clock_file)), monotonic=lambda: 0.0)
    app = build_app(service)
    options = uvicorn.Config(
        app,
        interface="asgi3",
        host="127.0.0.1",
        port=0,
        loop="uvloop",
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
    )
    Worker(options).run()


if __name__ == "__main__":
    main()
