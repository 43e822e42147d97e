"""`tokenauth serve`: read and check the configuration, listen, and run the main process."""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from tokenauth import file_descriptors, logs
from tokenauth.errors import ConfigError, StartError
from tokenauth.logs import describe, log
from tokenauth.passwords import Passwords
from tokenauth.risks import Risk, check_accepted, find_risks, log_and_check
from tokenauth.server.greeting import greeting
from tokenauth.server.listener import listen
from tokenauth.server.supervisor import START_FAILED, Signals, Supervisor
from tokenauth.server.terminal import Terminal
from tokenauth.server.totals import Totals
from tokenauth.settings import loader
from tokenauth.settings.model import Settings

_IGNORED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU)
"""Signals that have a meaning for other servers. By default they would end or suspend this one."""


class Invocation(NamedTuple):
    """How a person runs other commands, as `serve` was run: the program, and the options that they need as well."""

    program: str = "tokenauth"
    options: str = ""


def serve(
    path: Path,
    host: str | None,
    port: int | None,
    workers: int | None,
    nohup: bool = False,
    command: Invocation = Invocation(),  # noqa: B008  (immutable)
) -> int:
    """Serve until SIGTERM or SIGINT, and reload the configuration at SIGHUP. Return the exit code.

    Stop also when the terminal is closed, unless `nohup`. The arguments take precedence over the file.
    """
    file_descriptors.raise_limit()
    terminal = Terminal(watch=not nohup)
    signals = Signals()
    # Until the file is read, which may take long, SIGINT and SIGTERM end the process: see `tokenauth.cli`.
    signals.catch(signal.SIGHUP, signal.SIGCHLD)
    try:
        file = loader.load(path)
        socket = None if host is None and port is None else ""
        settings = loader.override(file, host=host, port=port, socket=socket, workers=workers)
        risks = _find_risks(path, settings)
        _check_risks(path, settings, risks, quiet=logs.on_terminal())
    except ConfigError as error:
        log.critical("configuration_refused", detail=str(error))
        return START_FAILED
    except Exception as error:
        log.critical("start_failed", detail=describe(error))
        return START_FAILED
    signals.catch(signal.SIGINT, signal.SIGTERM)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    totals = None
    try:
        if settings.metrics.listen:
            from tokenauth.server.exporter import Exporter

            totals = Totals(settings.server.workers)
            log.info("metrics_listening", port=Exporter(settings.metrics, totals).port)
        listener = listen(settings.server)
    except StartError as error:
        log.critical("start_failed", detail=str(error))
        return START_FAILED
    if settings.server.socket:
        port = 0
        log.info("listening", socket=settings.server.socket, workers=settings.server.workers, pid=os.getpid())
    else:
        port = listener.getsockname()[1]
        log.info("listening", host=settings.server.host, port=port, workers=settings.server.workers, pid=os.getpid())
    try:
        reload = partial(_reload, path, file, settings, workers)
        supervisor = Supervisor(path, settings, reload, listener, signals, terminal, totals)
        if logs.on_terminal():
            supervisor.greeting = greeting(settings, port, risks, *command)
    except OSError as error:
        log.critical("start_failed", detail=describe(error))
        return START_FAILED
    return supervisor.run()


def _find_risks(path: Path, settings: Settings) -> Sequence[Risk]:
    """Return the risks. Raises ConfigError for settings that cannot work."""
    with loader.naming(path):
        return find_risks(settings, Passwords(settings.passwords, settings.users_by_name), path)


def _check_risks(path: Path, settings: Settings, risks: Sequence[Risk], quiet: bool = False) -> None:
    """Log the risks; if `quiet`, only when one is not allowed on this address. Raises ConfigError for that."""
    with loader.naming(path):
        if quiet:
            with suppress(ConfigError):
                return check_accepted(settings, risks)
        return log_and_check(settings, risks)


def _reload(path: Path, first: Settings, served: Settings, workers: int | None) -> Settings:
    """Read the file again; the address stays. Raises ConfigError."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: is not a regular file, so it cannot be reloaded: restart to change the settings")
    file = loader.load(path)
    if _address(file) != _address(first):
        log.warning("restart_needed", detail=f"{path}: server.host, port and socket change only at a restart")
    if file.metrics != served.metrics:
        log.warning("restart_needed", detail=f"{path}: metrics.listen changes only at a restart")
        file = replace(file, metrics=served.metrics)
    settings = loader.override(
        file, host=served.server.host, port=served.server.port, socket=served.server.socket, workers=workers
    )
    _check_risks(path, settings, _find_risks(path, settings))
    return settings


def _address(settings: Settings) -> tuple[object, ...]:
    """Return the settings of the listening socket."""
    server = settings.server
    return server.host, server.port, server.socket, server.socket_mode
