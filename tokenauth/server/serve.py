"""`tokenauth serve`: read and check the configuration, listen, and run the main process."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenauth import file_descriptors, logs
from tokenauth.audit.log import AuditLog, auditing
from tokenauth.errors import ConfigError, StartError
from tokenauth.logs import describe, log
from tokenauth.server.configuration import ConfigurationFile
from tokenauth.server.control import AVAILABLE, Control
from tokenauth.server.greeting import greeting
from tokenauth.server.listener import listen
from tokenauth.server.service_manager import ServiceManager
from tokenauth.server.supervisor import START_FAILED, Signals, Supervisor
from tokenauth.server.terminal import Terminal
from tokenauth.server.totals import Totals

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
    manager = ServiceManager(os.environ)
    terminal = Terminal(watch=not nohup)
    signals = Signals()
    # Until the file is read, which may take long, SIGINT and SIGTERM end the process: see `tokenauth.cli`.
    signals.catch(signal.SIGHUP, signal.SIGCHLD)
    file = ConfigurationFile(path, host, port, workers)
    try:
        configuration, risks = file.read(quiet=logs.on_terminal())
        settings = configuration.settings
    except ConfigError as error:
        log.critical("configuration_refused", detail=str(error))
        return START_FAILED
    except Exception as error:
        log.critical("start_failed", detail=describe(error))
        return START_FAILED
    signals.catch(signal.SIGINT, signal.SIGTERM)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    audit = AuditLog(settings.audit) if settings.audit.file else None
    totals = Totals(settings.server.workers, audit)
    try:
        if settings.metrics.listen:
            from tokenauth.server.exporter import Exporter

            log.info("metrics_listening", port=Exporter(settings.metrics, totals).port)
        listener = listen(settings.server)
    except StartError as error:
        log.critical("start_failed", detail=str(error))
        return START_FAILED
    with auditing(audit):
        if settings.server.socket:
            port = 0
            log.info("listening", socket=settings.server.socket, workers=settings.server.workers, pid=os.getpid())
        else:
            port, host = listener.getsockname()[1], settings.server.host
            log.info("listening", host=host, port=port, workers=settings.server.workers, pid=os.getpid())
        try:
            controls = _controls(path)
            supervisor = Supervisor(file, configuration, listener, signals, terminal, manager, totals, controls)
            supervisor.audit = audit
            if logs.on_terminal():
                supervisor.greeting = greeting(settings, port, risks, *command)
        except OSError as error:
            log.critical("start_failed", detail=describe(error))
            return START_FAILED
        return supervisor.run()


def _controls(path: Path) -> Sequence[Control]:
    """Return the ends of `tokenauth reload`, `throttle` and `health`; none where they do not work: signals do."""
    if not AVAILABLE:
        return ()
    try:
        return Control(path), Control(path, "throttle"), Control(path, "address")
    except (OSError, ConfigError) as error:
        log.warning("control_unavailable", reason=str(error), action="send SIGHUP instead of `tokenauth reload`")
        return ()
