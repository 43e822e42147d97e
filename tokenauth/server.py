"""The processes: a supervisor that holds the socket, and the workers that serve."""

import ctypes
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import uvicorn
from msgspec.structs import replace
from starlette.types import ASGIApp
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

from tokenauth import config, configfile, logs
from tokenauth.config import Config
from tokenauth.errors import ConfigError, StartError
from tokenauth.logs import log
from tokenauth.protocol import BoundedProtocol

KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: longer than the 60 of nginx, so that it is nginx who closes."""

_PAUSE = 1.0
"""Seconds until a worker that could not start is started again."""

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

    Returns the exit code. Raises ConfigError or StartError before anything listens.
    """
    settings = read(path, host, port, workers)
    options = uvicorn_options(partial(work, path, host, port, workers), settings.server)
    listener = _listen(settings.server)
    supervisor = Supervisor(options, sockets=[listener])
    log.info("listening", host=settings.server.host, port=listener.getsockname()[1], workers=settings.server.workers)
    supervisor.run()
    ends = [process.exitcode or 0 for process in supervisor.processes]
    return max((abs(end) for end in ends if end != -signal.SIGTERM), default=0)  # uvicorn raises it again at its end


class Supervisor(Multiprocess):
    """uvicorn's supervisor, which stops listening before its workers do, and sees at once when one has ended.

    A first start that fails ends it. Once it has served, a worker that cannot start is started again until it can:
    the others go on meanwhile, and so does the service when the store is back.
    """

    _served = False

    def init_processes(self) -> None:
        """Start the workers."""
        super().init_processes()
        self._let_go()

    def keep_subprocess_alive(self) -> None:
        """Replace the workers that have ended, or do not answer."""
        for place, process in enumerate(self.processes):
            if process.is_alive(timeout=self.config.timeout_worker_healthcheck):
                self._served = self._served or process.is_ready()
                continue
            process.kill()
            process.join()
            if process.exitcode == uvicorn.config.STARTUP_FAILURE and not self._served:
                self.should_exit.set()
                return
            log.error("worker_replaced", exit_code=process.exitcode)
            if process.exitcode == uvicorn.config.STARTUP_FAILURE:
                time.sleep(_PAUSE)
            self.processes[place] = Process(self.config, self.sockets)
            self.processes[place].start()
        self._let_go()

    def _let_go(self) -> None:
        """Close this process's copies of the workers' ends: a pipe to nobody says so, one to oneself is waited for."""
        for process in self.processes:
            process.child_conn.close()

    def terminate_all(self) -> None:
        """Take no new connections, then end the workers; those that have not begun to serve need not be asked."""
        for listener in self.sockets:
            listener.close()
        for process in tuple(self.processes):
            if process.is_ready(GRACE):
                process.terminate()
            elif process.exitcode is None:
                process.kill()
                process.join()
                self.processes.remove(process)


def _listen(terms: config.Server) -> socket.socket:
    """Listen from now on: who connects while the workers start has to wait, and is not refused."""
    family = socket.AF_INET6 if ":" in terms.host else socket.AF_INET
    try:
        listener = socket.create_server((terms.host, terms.port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(f"cannot listen on server.host {terms.host!r}, server.port {terms.port}: {error}") from None
    listener.set_inheritable(True)
    return listener


def uvicorn_options(app: Callable[[], ASGIApp], terms: config.Server) -> uvicorn.Config:
    """Set up the HTTP server under the application; the benchmark's yardstick runs on the same."""
    return uvicorn.Config(
        app,
        factory=True,
        interface="asgi3",  # uvicorn would not see it: what answers at once is no coroutine function
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
        timeout_worker_healthcheck=GRACE,
    )


def work(path: Path, host: str | None, port: int | None, workers: int | None) -> ASGIApp:
    """Build the app in a worker; it reads the file itself, so that a replaced worker sees what changed."""
    _end_with_parent()
    logs.configure()
    from tokenauth.app import create_app  # the supervisor has no need of it

    try:
        settings = read(path, host, port, workers)
        with configfile.naming(path):
            return create_app(settings)
    except ConfigError as error:
        log.error("configuration_refused", detail=str(error))
        sys.exit(uvicorn.config.STARTUP_FAILURE)


def _end_with_parent() -> None:
    """Have Linux send SIGTERM to this worker when its supervisor has been killed; elsewhere it would live on."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_PR_SET_PDEATHSIG = 1
