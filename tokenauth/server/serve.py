"""`tokenauth serve`: reads and judges the configuration, listens, and runs the main process."""

import errno
import os
import signal
import socket
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from tokenauth import file_descriptors
from tokenauth.errors import ConfigError, StartError
from tokenauth.logs import describe, log
from tokenauth.passwords import Passwords
from tokenauth.risks import find_risks, judge
from tokenauth.server.supervisor import START_FAILED, Signals, Supervisor
from tokenauth.settings import loader
from tokenauth.settings.model import ServerSettings, Settings

_IGNORED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU)
"""Signals that other servers take for orders, and that would end or stop this one."""


def serve(path: Path, host: str | None, port: int | None, workers: int | None) -> int:
    """Serve until SIGTERM or SIGINT; at SIGHUP, read the file again and serve what it says then.

    Returns the exit code. Raises ConfigError for a file that cannot be read.
    """
    file_descriptors.raise_limit()
    signals = Signals()
    signals.catch(signal.SIGHUP, signal.SIGCHLD)  # SIGINT and SIGTERM may still end what may wait: reading the file
    file = loader.load(path)
    settings = _override(file, host, port, workers)
    try:
        _judge(path, settings)
    except ConfigError as error:
        log.critical("configuration_refused", detail=str(error))
        return START_FAILED
    except Exception as error:
        log.critical("start_failed", detail=describe(error))
        return START_FAILED
    signals.catch(signal.SIGINT, signal.SIGTERM)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    try:
        listener = _listen(settings.server)
    except StartError as error:
        log.critical("start_failed", detail=str(error))
        return START_FAILED
    address = {"host": settings.server.host, "port": listener.getsockname()[1]}
    log.info("listening", **address, workers=settings.server.workers, pid=os.getpid())
    try:
        supervisor = Supervisor(path, settings, partial(_reread, path, file, settings, workers), listener, signals)
    except OSError as error:
        log.critical("start_failed", detail=describe(error))
        return START_FAILED
    return supervisor.run()


def _override(file: Settings, host: str | None, port: int | None, workers: int | None) -> Settings:
    """Put what the command line says in place of what the file says. Raises ConfigError."""
    given = {"host": host, "port": port, "workers": workers}
    changes = {key: value for key, value in given.items() if value is not None}
    try:
        return replace(file, server=replace(file.server, **changes))
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


def _judge(path: Path, settings: Settings) -> None:
    """Log the risks. Raises ConfigError for what cannot be served, or must not be at this address."""
    with loader.naming(path):
        judge(settings, find_risks(settings, Passwords(settings.passwords, settings.directory), path))


def _reread(path: Path, first: Settings, served: Settings, workers: int | None) -> Settings:
    """Read the file again, for the address that is served. Raises ConfigError."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: is not a regular file, so it cannot be read again; restart to change the settings")
    file = loader.load(path)
    if (file.server.host, file.server.port) != (first.server.host, first.server.port):
        log.warning("restart_needed", detail=f"{path}: server.host and server.port change at a restart only")
    settings = _override(file, served.server.host, served.server.port, workers)
    _judge(path, settings)
    return settings


def _listen(settings: ServerSettings) -> socket.socket:
    """Listen from now on: a client that connects while the workers start has to wait, and is not refused."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(f"Port {settings.port} is in use: stop the other server or pass --port.") from None
        raise StartError(
            f"cannot listen on server.host {settings.host!r}, server.port {settings.port}: {error}"
        ) from None
