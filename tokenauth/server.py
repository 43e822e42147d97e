"""The processes: a supervisor that holds the socket, and the workers that serve."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import uvicorn
from msgspec.structs import replace
from starlette.types import ASGIApp
from uvicorn.supervisors import Multiprocess

from tokenauth import config, configfile, logs
from tokenauth.config import Config
from tokenauth.errors import ConfigError
from tokenauth.logs import log
from tokenauth.protocol import BoundedProtocol

KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: longer than the 60 of nginx, so that it is nginx who closes."""

GRACE = 30
"""Seconds that requests under way are given at SIGTERM."""


def read(path: Path, host: str | None, port: int | None, workers: int | None) -> Config:
    """Read the configuration, with what the command line says instead. Raises ConfigError."""
    given = {"host": host, "port": port, "workers": workers}
    changes = {key: value for key, value in given.items() if value is not None}
    settings = configfile.load(path)
    try:
        return replace(settings, server=replace(settings.server, **changes))
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


def serve(path: Path, host: str | None, port: int | None, workers: int | None) -> int:
    """Serve until SIGTERM or SIGINT; at SIGHUP, replace the workers one by one by such as read the file anew.

    Returns the exit code. Raises ConfigError before anything listens.
    """
    settings = read(path, host, port, workers)
    options = uvicorn_options(partial(work, path, host, port, workers), settings.server)
    socket = options.bind_socket()
    supervisor = Multiprocess(options, sockets=[socket])
    log.info("listening", host=settings.server.host, port=socket.getsockname()[1], workers=settings.server.workers)
    supervisor.run()
    return max((process.exitcode or 0 for process in supervisor.processes), default=0)


def uvicorn_options(app: Callable[[], ASGIApp], terms: config.Server) -> uvicorn.Config:
    """Set up the HTTP server under the application; the benchmark's yardstick runs on the same."""
    return uvicorn.Config(
        app,
        factory=True,
        host=terms.host,
        port=terms.port,
        workers=terms.workers,
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


def work(path: Path, host: str | None, port: int | None, workers: int | None) -> ASGIApp:
    """Build the app in a worker; it reads the file itself, so that a replaced worker sees what changed."""
    logs.configure()
    from tokenauth.app import create_app  # the supervisor has no need of it

    try:
        return create_app(read(path, host, port, workers))
    except ConfigError as error:
        log.error("configuration_refused", detail=str(error))
        sys.exit(uvicorn.config.STARTUP_FAILURE)
