"""The main process: starts the workers, replaces those that end, and reloads the configuration.

Only a signal ends it, or a first start that fails. It blocks only while it waits for the next event, so it handles
signals at once.
"""

import gc
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from msgspec.structs import replace

from tokenauth import build, installed_build, logs
from tokenauth.audit.log import AuditLog
from tokenauth.errors import ConfigError
from tokenauth.logs import log
from tokenauth.models import DATABASE_LOST, ServedDatabase, Throttled
from tokenauth.revocation_queue import HeldRevocations, RevocationUpdate
from tokenauth.server.channel import (
    GRACE,
    HEARTBEAT,
    Alone,
    Applied,
    ChangeUsers,
    Channel,
    NodeAnswer,
    Order,
    Report,
    Serve,
    Stop,
    decode_report,
    encode_order,
)
from tokenauth.server.configuration import Configuration, ConfigurationFile
from tokenauth.server.control import Address, Command, Control, ReloadAnswer
from tokenauth.server.listener import stop_handshakes
from tokenauth.server.service_manager import ServiceManager
from tokenauth.server.terminal import Terminal
from tokenauth.server.tls import RENEW, KeyPair, Validity
from tokenauth.server.totals import Totals
from tokenauth.settings.differences import find_differences
from tokenauth.settings.model import Settings
from tokenauth.status import WorkerStatus

START_FAILED = 3
"""The exit code when the first start fails."""

_STARTING_TIME = 1.0
"""Seconds to stop for a worker that does not serve yet. Then it is killed."""

_TIMEOUT = 60
"""Heartbeats without a report after which a worker is killed, and heartbeats after which a reload is aborted."""

_CLOSE_TIME = 10.0
"""Seconds to close the store, after the GRACE seconds in which a worker answers its requests. Then it is killed."""

_REPLACE_TIME = 5.0
"""Seconds that a reload waits until no replaced worker takes a request any more. One that hangs may need longer."""

_HEALTHY = 10.0
"""Seconds of service after which a worker that ends is replaced at once; otherwise after a growing delay."""

_MIN_DELAY, _MAX_DELAY = 1.0, 60.0
"""Seconds between two attempts to start a worker. The delay grows by half each time."""

_MAX_STDERR = 8192
"""Bytes to keep of what a worker writes to standard error before its log is set up."""

_REPEAT = 1.0
"""Signals to stop within this many seconds count as one: `timeout` and some process managers send two."""

_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


class Interrupted(BaseException):
    """Raised by a signal that must not wait for the current operation."""


class Signals:
    """Collects signals, and makes `fileno` readable when one arrives."""

    def __init__(self) -> None:
        self._caught: list[signal.Signals] = []
        self._interrupting: frozenset[signal.Signals] = frozenset()
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)

    def fileno(self) -> int:
        return self._receiver.fileno()

    def catch(self, *numbers: signal.Signals) -> None:
        """Collect these signals from now on."""
        for number in numbers:
            signal.signal(number, self._on_signal)

    def take(self) -> Sequence[signal.Signals]:
        """Return the signals since the last call, in order."""
        with suppress(BlockingIOError):
            while self._receiver.recv(4096):
                pass
        caught, self._caught = self._caught, []  # a signal that arrives in between is in one of the two lists
        return caught

    @contextmanager
    def interrupting(self, *numbers: signal.Signals) -> Iterator[None]:
        """Make these signals raise Interrupted as well, in an operation that may take long."""
        self._interrupting = frozenset(numbers)
        try:
            yield
        finally:
            self._interrupting = frozenset()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        found = signal.Signals(number)
        self._caught.append(found)
        if found in self._interrupting:
            self._interrupting = frozenset()
            raise Interrupted


class _Worker:
    """A worker process, seen from the main process."""

    def __init__(self, listener: socket.socket, log_fd: int) -> None:
        """Start the process, which waits for its first order. Raises OSError."""
        self.reported = False
        self.ready = False
        self.drained = False
        self.kill_at = math.inf
        self.silent_heartbeats = 0
        self.started_at = time.monotonic()
        self.failure: Report | None = None
        self.database: str | None = None
        self.killed = False
        self.alone = False
        self.channel_closed = False
        self._stderr = b""
        here, there = socket.socketpair()
        self.stderr, stderr_end = -1, -1
        try:
            self.stderr, stderr_end = os.pipe()
            os.set_blocking(self.stderr, False)
            descriptors = (there.fileno(), listener.fileno(), log_fd)
            self._process = _start_python(descriptors, stderr_end)
        except BaseException:
            here.close()
            self.close_stderr()
            raise
        finally:
            there.close()
            if stderr_end >= 0:
                os.close(stderr_end)
        self.channel = Channel(here)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def step(self) -> str:
        """What it does, as far as its reports show."""
        if self.ready:
            return "serving"
        return "opening the database" if self.reported else "loading its code"

    def exit_code(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self._process.poll()

    def read_stderr(self) -> bool:
        """Read what the process wrote to standard error before its log was set up. Return False at the end of that."""
        try:
            while data := os.read(self.stderr, _MAX_STDERR):
                self._stderr = (self._stderr + data)[-_MAX_STDERR:]
        except BlockingIOError:
            return True
        return False

    def close_stderr(self) -> None:
        if self.stderr >= 0:
            os.close(self.stderr)
            self.stderr = -1

    def stderr_line(self) -> str:
        """Return the last line from standard error, preferably one about an error."""
        lines = [line.strip() for line in self._stderr.decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return (errors or lines or [""])[-1]

    def reason(self) -> str:
        if self.failure is not None:
            return self.failure.reason
        code = self.exit_code() or 0
        if code < 0:
            with suppress(ValueError):
                return f"ended by {signal.Signals(-code).name}"
        return self.stderr_line() or f"ended with exit code {code}"

    def kill(self) -> None:
        self.killed = True
        self._process.kill()


def _start_python(descriptors: tuple[int, int, int], standard_error: int) -> subprocess.Popen[bytes]:
    """Start a Python that runs a worker with these file descriptors. Raises OSError.

    Signals that concern the main process are blocked in the child until it ignores them.
    """
    without_gc = "import gc; gc.disable()"  # until it serves: it takes a sixth of the time of a start
    program = f"{without_gc}; from tokenauth.server.worker import spawn_main; spawn_main{descriptors}"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return subprocess.Popen(  # noqa: S603  (this Python, and three numbers)
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.DEVNULL,
            stderr=standard_error,
            pass_fds=descriptors,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Slot:
    """A slot for one worker: the worker that runs, or when to start the next one."""

    def __init__(self) -> None:
        self.worker: _Worker | None = None
        self.due = 0.0
        self._delay = 0.0

    def postpone(self, least: float = 0.0) -> float:
        """Delay the next start, longer each time and for at least `least` seconds. Return the seconds."""
        delay = max(self._delay, least)
        self._delay = min(max(_MIN_DELAY, delay * 1.5), _MAX_DELAY)
        self.due = time.monotonic() + delay
        return round(delay, 1)

    def vacate(self, served_seconds: float) -> float:
        """Remove a worker that has ended. Return the seconds until the next one starts."""
        self.worker = None
        if served_seconds >= _HEALTHY:
            self._delay = 0.0
        return self.postpone()


class _Passing:
    """An update of a worker that is being passed on, and the workers that have not applied it yet."""

    def __init__(self, source: _Worker, number: int, waiting: set[_Worker]) -> None:
        self.source = source
        self.number = number
        self.waiting = waiting


class _Reload:
    """A new configuration, and its workers, which serve it when all of them are ready."""

    def __init__(
        self,
        configuration: Configuration,
        cause: str,
        changes: Mapping[str, Sequence[str]],
        commands: Sequence[Command],
    ) -> None:
        self.settings, self.certificate, self.restart_needed = configuration
        self.cause = cause
        self.changes = changes
        self.commands = commands
        self.slots = [_Slot() for _ in range(self.settings.server.workers)]
        self.heartbeats = 0
        self.overtaken = False
        """Whether a later reload was refused meanwhile."""


class Supervisor:
    """Keeps the workers of a configuration running, and replaces them all for a new configuration."""

    def __init__(
        self,
        file: ConfigurationFile,
        configuration: Configuration,
        listener: socket.socket,
        signals: Signals,
        terminal: Terminal,
        manager: ServiceManager,
        totals: Totals,
        controls: Sequence[Control] = (),
    ) -> None:
        """Serve a configuration, which was read from `file`, on the listener. Raises OSError.

        SIGHUP has the file read again. So does a command, and with `reload = "watch"` a change of a file. The SIGHUP of
        a terminal that was closed stops the server instead.
        `totals` gets what the workers count, for metrics and for /api/status. Commands arrive at the `controls`.
        """
        self.greeting = ""
        """A text for people, shown once a worker serves."""
        self.audit: AuditLog | None = None
        """Writes what workers could not write before their end."""
        self._file = file
        self._totals = totals
        self._controls = controls
        self._settings = settings = configuration.settings
        self._started_with = settings.server
        self._use_certificate(configuration.certificate)
        self._users = settings.users_by_name
        self._listener = listener
        self._signals = signals
        self._terminal = terminal
        self._manager = manager
        self._log_fd = os.dup(2)
        self._selector = selectors.PollSelector()  # unlike epoll, it needs no descriptor
        self._selector.register(signals, selectors.EVENT_READ)
        for control in controls:
            self._selector.register(control, selectors.EVENT_READ, control)
        self._slots = [_Slot() for _ in range(settings.server.workers)]
        self._reload: _Reload | None = None
        self._replacing: _Reload | None = None
        self._replace_deadline = math.inf
        self._commands: Sequence[Command] = ()
        self._reload_cause: str | None = None
        self._retiring: set[_Worker] = set()
        self._held = HeldRevocations()
        self._updates: list[tuple[RevocationUpdate, _Worker]] = []
        self._passing: dict[int, _Passing] = {}
        self._passed = 0
        self._has_served = False
        self._database: str | None = None
        self._stopping = False
        self._stop_requested_at = -math.inf
        self._exit_code = 0
        self._last_heartbeat = time.monotonic()
        self._step_failed = False
        self._ready: list[tuple[selectors.SelectorKey, int]] = []

    def run(self) -> int:
        """Serve until a signal or a failed first start. Return the exit code.

        Each step runs even if another fails, so signals are always handled and ended workers always noticed.
        """
        steps = (
            self._handle_signals,
            self._receive,
            self._heartbeat,
            self._begin_reload,
            self._reap,
            self._start_workers,
            self._note_alone,
            self._replace_workers,
            self._finish_reload,
            self._kill_overdue,
        )
        gc.freeze()
        gc.enable()  # see tokenauth.cli: it was disabled for the start
        while not self._stopping or any(True for _ in self._workers()):
            for step in (self._wait, *steps):
                try:
                    step()
                except Exception as error:
                    self._step_failed = True
                    with suppress(Exception):
                        log.error("main_process_failed", step=step.__name__.strip("_"), reason=logs.describe(error))
        self._held.log_lost()
        return self._exit_code

    def _workers(self) -> Iterator[_Worker]:
        """Yield all workers that have not ended."""
        new = self._reload.slots if self._reload is not None else []
        for slot in (*self._slots, *new):
            if slot.worker is not None:
                yield slot.worker
        yield from tuple(self._retiring)

    def _wait(self) -> None:
        """Wait for the next event or the next start of a worker; after a failed step, first wait for a signal only."""
        self._ready = []
        if self._step_failed:
            self._step_failed = False
            with suppress(OSError), selectors.PollSelector() as selector:
                selector.register(self._signals, selectors.EVENT_READ)
                selector.select(_MIN_DELAY)
        now = time.monotonic()
        due = min([now + HEARTBEAT, *(slot.due for slot in self._vacant())])
        self._ready = self._selector.select(max(0.0, due - now))

    def _vacant(self) -> list[_Slot]:
        """Return the slots that need a worker."""
        if self._stopping:
            return []
        slots = [*self._slots, *(self._reload.slots if self._reload is not None else [])]
        return [slot for slot in slots if slot.worker is None]

    def _handle_signals(self) -> None:
        for number in self._signals.take():
            if number in {signal.SIGTERM, signal.SIGINT}:
                now = time.monotonic()
                if number == signal.SIGINT and logs.on_terminal():
                    logs.show("")  # the shell's prompt does not follow on the line with "^C"
                if not self._stopping:
                    self._stop_requested_at = now
                    self._stop(number.name)
                elif now >= self._stop_requested_at + _REPEAT:
                    self._kill(self._workers(), f"a second signal: {number.name}")
            elif number == signal.SIGHUP and not self._stopping:
                if self._terminal.hung_up():
                    self._stop(number.name)
                else:
                    self._reload_cause = "signal"

    def _receive(self) -> None:
        """Read reports of the workers, and send orders that are still pending."""
        for control in self._controls:
            control.flush()
        ready, self._ready = self._ready, []  # stale after a failed wait
        for key, events in ready:
            if isinstance(key.data, _Worker):
                worker = key.data
                if key.fileobj is not worker.channel:
                    if not worker.read_stderr():
                        self._close_stderr(worker)
                    continue
                if events & selectors.EVENT_WRITE:
                    worker.channel.flush()
                    self._watch(worker)
                if events & selectors.EVENT_READ:
                    self._take_reports(worker)
        self._pass_on()
        for key, _ in ready:  # last, as it fails when descriptors are short
            if isinstance(key.data, Control) and key.data in self._controls:
                self._take_commands(key.data)

    def _take_commands(self, control: Control) -> None:
        commands = control.accept()
        if control.purpose == "throttle":
            _answer(commands, self._totals.list_throttled())
        elif control.purpose == "address":
            _answer(commands, self._find_address())
        elif commands:
            self._commands = [*self._commands, *commands]
            self._reload_cause = "command"

    def _find_address(self) -> Address:
        server = self._started_with
        if server.socket:
            return Address(server.reachable_host, 0, False, os.path.abspath(server.socket))
        return Address(server.reachable_host, self._listener.getsockname()[1], self._certificate is not None, "")

    def _take_reports(self, worker: _Worker) -> None:
        try:
            reports = [decode_report(each) for each in worker.channel.receive()]
        except EOFError:  # it is ending
            with suppress(KeyError):  # this was noticed before
                self._selector.unregister(worker.channel)
            self._note_channel_closed(worker)
            return
        if not reports:
            return
        worker.silent_heartbeats = 0
        if not worker.reported and worker.stderr_line() and reports[0].state != "failed":
            log.warning("worker_stderr", pid=worker.pid, detail=worker.stderr_line())
        worker.reported = True
        for report in reports:
            self._take_report(worker, report)

    def _take_report(self, worker: _Worker, report: Report) -> None:
        if report.state == "failed":
            worker.failure = report
        elif report.state == "ready":
            worker.ready = True
            worker.started_at = time.monotonic()
            if worker.kill_at < math.inf:
                worker.kill_at = worker.started_at + GRACE + _CLOSE_TIME
            if not self._has_served:
                self._has_served = True
                self._manager.ready()
                self._greet()
        if report.database is not None:
            worker.database = report.database
            self._note_database(worker)
        if report.metrics is not None:
            self._totals.update(worker.pid, report.metrics)
        if report.revocations is not None:
            self._updates.append((report.revocations, worker))
        if report.asks:
            self._send([worker], NodeAnswer(self._totals.status([*self._running()])))
        if report.applied:
            self._applied(report.applied, worker)
        if report.drained:
            worker.drained = True
        if report.acts and self.audit is not None:
            self.audit.take(report.acts)

    def _running(self) -> Iterator[WorkerStatus]:
        """Yield the workers that serve, without those that were replaced."""
        now, monotonic = time.time(), time.monotonic()
        for slot in self._slots:
            if slot.worker is not None and slot.worker.ready:
                yield WorkerStatus(slot.worker.pid, int(now - monotonic + slot.worker.started_at))

    def _greet(self) -> None:
        text, self.greeting = self.greeting, ""
        if text:
            logs.show(text)

    def _note_database(self, worker: _Worker) -> None:
        """Remember which database the current workers serve. Once one has lost it, no later worker opens another."""
        if (self._database is None or worker.database == DATABASE_LOST) and any(
            slot.worker is worker for slot in self._slots
        ):
            self._database = worker.database

    def _pass_on(self) -> None:
        """Pass on what workers hold or have revoked, so that all others refuse it too.

        Before that, all reports have been read. So a worker that has not reported yet has cached no token that was
        revoked before, and is not waited for.
        """
        while self._updates:
            update, source = self._updates.pop(0)
            self._held.apply(update)
            others = [worker for worker in self._workers() if worker is not source]
            order = replace(update, written=[], number=0)
            waiting: set[_Worker] = set()
            if update.number and not source.channel_closed:
                waiting = {worker for worker in others if worker.reported and not worker.channel_closed}
                if waiting:
                    self._passed += 1
                    self._passing[self._passed] = _Passing(source, update.number, waiting)
                    self._send(waiting, replace(order, number=self._passed))
                else:
                    self._send([source], Applied(update.number))
            if order != RevocationUpdate():
                self._send([worker for worker in others if worker not in waiting], order)

    def _applied(self, number: int, worker: _Worker) -> None:
        """Note that a worker has applied an update, and answer its source once all have."""
        passing = self._passing.get(number)
        if passing is not None:
            passing.waiting.discard(worker)
            if not passing.waiting:
                del self._passing[number]
                self._send([passing.source], Applied(passing.number))

    def _note_channel_closed(self, worker: _Worker) -> None:
        """Note that a worker has closed its channel: it answers no more requests, so it has no update to apply."""
        worker.channel_closed = True
        for number, passing in list(self._passing.items()):
            if passing.source is worker:
                del self._passing[number]
            else:
                self._applied(number, worker)

    def _note_alone(self) -> None:
        """Tell each worker whether it is the only one. A new one needs far longer to start than this takes."""
        workers = list(self._workers())
        for worker in workers:
            if worker.alone != (len(workers) == 1):
                worker.alone = not worker.alone
                self._send([worker], Alone(worker.alone))

    def _send(self, workers: Iterable[_Worker], order: Order) -> None:
        encoded = encode_order(order)
        for worker in workers:
            worker.channel.send(encoded)
            self._watch(worker)

    def _watch(self, worker: _Worker) -> None:
        """Watch the channel of a worker for reports, and for room to send if orders are pending."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.channel.pending else 0)
        with suppress(KeyError):  # the worker has closed it
            self._selector.modify(worker.channel, events, worker)

    def _close_stderr(self, worker: _Worker) -> None:
        """Close the pipe of a worker's standard error: its log is set up, or it has ended."""
        if worker.stderr >= 0:
            with suppress(KeyError):
                self._selector.unregister(worker.stderr)
            worker.close_stderr()

    def _heartbeat(self) -> None:
        """Count seconds in which this process ran: while the machine is suspended, no worker can report."""
        if time.monotonic() - self._last_heartbeat < HEARTBEAT:
            return
        self._last_heartbeat = time.monotonic()
        self._manager.alive()
        self._totals.update_history()
        if self._terminal.check() and not self._stopping:
            self._stop(signal.SIGHUP.name)
        if self._reload is not None:
            self._reload.heartbeats += 1
        elif self._settings.server.reload == "watch" and self._file.changed():
            self._reload_cause = self._reload_cause or "watch"
        for worker in self._workers():
            worker.silent_heartbeats += 1
            if worker.silent_heartbeats > _TIMEOUT and not worker.killed:
                worker.failure = Report("failed", f"sent no report for {_TIMEOUT} seconds, while {worker.step}")
                worker.kill()

    def _reap(self) -> None:
        """Handle the workers that have ended."""
        for worker in list(self._workers()):
            code = worker.exit_code()
            if code is not None:
                self._forget(worker)
                self._totals.end(worker.pid)
                self._note_exit(worker, code)
                self._pass_on()  # its last reports

    def _forget(self, worker: _Worker) -> None:
        """Read the last reports of a worker that has ended, and close its descriptors."""
        with suppress(Exception):  # reading can fail for lack of memory; the descriptors are closed in any case
            self._take_reports(worker)
            if worker.stderr >= 0:
                worker.read_stderr()
        self._close_stderr(worker)
        with suppress(KeyError):
            self._selector.unregister(worker.channel)
        self._note_channel_closed(worker)
        worker.channel.close()

    def _note_exit(self, worker: _Worker, code: int) -> None:
        served_seconds = time.monotonic() - worker.started_at if worker.ready else 0.0
        ending = (self._stopping and self._exit_code != START_FAILED) or worker in self._retiring
        if ending and code and (worker.failure is not None or not worker.killed):
            log.error("worker_failed", exit_code=code, reason=worker.reason())
        if worker in self._retiring:
            self._retiring.discard(worker)
            return
        if self._reload is not None:
            for slot in self._reload.slots:
                if slot.worker is worker:
                    slot.worker = None
                    if not self._stopping:
                        self._abort_reload(worker.reason())
                    return
        for slot in self._slots:
            if slot.worker is worker:
                if self._stopping:
                    slot.worker = None
                elif not self._has_served:
                    slot.worker = None
                    self._give_up(worker.reason(), worker.failure)
                else:
                    delay = slot.vacate(served_seconds)
                    self._totals.crashes += 1
                    log.error("worker_replaced", exit_code=code, reason=worker.reason(), retry_in=delay)
                    other = self._other_build()
                    if other is not None:
                        log.error("restart_needed", detail=f"{other}, or old and new code run together")

    def _start_workers(self) -> None:
        """Start a worker in each slot whose delay is over."""
        for slot in self._vacant():
            if slot.due > time.monotonic():
                continue
            try:
                current = slot in self._slots
                slots = self._slots if current or self._reload is None else self._reload.slots
                slot.worker = self._start_worker(current, counts_store=slot is slots[0])
            except Exception as error:  # no descriptors, no memory, no interpreter: it may work later
                reason = f"cannot start a worker: {logs.describe(error)}"
                if not self._has_served:
                    self._give_up(reason)
                    return
                log.error("worker_not_started", reason=reason, retry_in=slot.postpone(_MIN_DELAY))

    def _start_worker(self, current: bool, counts_store: bool) -> _Worker:
        """Start a worker for the current configuration, or for the one that is being loaded."""
        settings, certificate = self._settings, self._certificate
        if self._reload is not None and current:
            settings = replace(settings, users=self._reload.settings.users)
        elif self._reload is not None:
            settings, certificate = self._reload.settings, self._reload.certificate
        database = self._served_database(settings, current)
        order = encode_order(
            Serve(self._file.path, settings, self._held.snapshot(), database, counts_store, certificate)
        )
        worker = _Worker(self._listener, self._log_fd)
        try:
            self._selector.register(worker.channel, selectors.EVENT_READ, worker)
            self._selector.register(worker.stderr, selectors.EVENT_READ, worker)
            worker.channel.send(order)
            self._watch(worker)
        except BaseException:
            worker.kill()
            self._forget(worker)
            raise
        return worker

    def _served_database(self, settings: Settings, current: bool) -> ServedDatabase | None:
        """Return the database that a new worker must find; None for the first ones, also those of a new address.

        Without it, the worker of a new configuration does not start, so the current workers stay. One that replaces a
        current worker answers 503.
        """
        if self._database is None or settings.database.url != self._settings.database.url:
            return None
        return ServedDatabase(self._database, required=not current)

    def _give_up(self, reason: str, failure: Report | None = None) -> None:
        """Log why the first start failed, and stop."""
        event = "configuration_refused" if failure is not None and failure.configuration else "start_failed"
        log.critical(event, detail=reason)
        self._exit_code = START_FAILED
        self._stop(None)

    def _begin_reload(self) -> None:
        """Read the configuration and start workers for it. The current workers get its users at once.

        A reload whose workers are not ready yet is dropped for a later one. One that is replacing workers is finished
        first, so that its commands get an answer that is true.
        """
        cause = self._reload_cause
        if cause is None or self._stopping or self._replacing is not None:
            return
        self._reload_cause = None
        self._manager.reloading()
        other = self._other_build()
        if other is not None:
            self._refuse(cause, other)
            return
        try:
            with self._signals.interrupting(signal.SIGTERM, signal.SIGINT):
                configuration = self._file.read_again()
        except Interrupted:
            return
        except ConfigError as error:
            self._refuse(cause, str(error))
            return
        except Exception as error:
            self._refuse(cause, f"{self._file.path}: cannot be read: {logs.describe(error)}")
            return
        commands = [*(self._reload.commands if self._reload is not None else ()), *self._commands]
        self._drop_reload()
        self._reload = _Reload(configuration, cause, self._differences(configuration), commands)
        self._commands = ()
        self._send_users(configuration.settings)

    def _other_build(self) -> str | None:
        """Return why workers that start now would not fit to this process, or None.

        They have the code that is installed now.
        """
        installed = installed_build()
        if installed == build():
            return None
        return f"tokenauth {installed} is installed, and {build()} runs: restart tokenauth"

    def _differences(self, configuration: Configuration) -> Mapping[str, Sequence[str]]:
        """Return what differs from what is served, as names."""
        found = dict(find_differences(self._settings, configuration.settings))
        if configuration.certificate != self._certificate:
            changed = found.get("settings_changed", ())
            found["settings_changed"] = [*dict.fromkeys([*changed, "server.tls_certificate"])]
        return found

    def _refuse(self, cause: str, detail: str) -> None:
        """Log why the configuration could not be read, and say it to the commands that asked for that."""
        commands, self._commands = self._commands, ()
        log.error("reload_refused", cause=cause, detail=detail, **_by(commands))
        self._totals.note_reload(accepted=False)
        if self._reload is None:
            self._manager.ready()
        else:
            self._reload.overtaken = True
        _answer(commands, ReloadAnswer(False, detail, {}))

    def _send_users(self, settings: Settings) -> None:
        """Send the users of these settings to the current workers and to those that are stopping."""
        before, users = self._users, settings.users_by_name
        changed = {name: user for name, user in users.items() if before.get(name) != user}
        self._users = users
        current = [slot.worker for slot in self._slots if slot.worker is not None]
        removed = [name for name in before if name not in users]
        self._send((*current, *self._retiring), ChangeUsers(removed, changed))

    def _drop_reload(self) -> None:
        """Stop the workers of an unfinished reload in the usual way: they may have accepted requests."""
        reload, self._reload = self._reload, None
        for slot in reload.slots if reload is not None else ():
            if slot.worker is not None:
                self._retire(slot.worker)

    def _abort_reload(self, reason: str) -> None:
        """Keep the current configuration, and log why."""
        reload = self._reload
        assert reload is not None
        self._drop_reload()
        self._send_users(self._settings)
        log.error("reload_refused", cause=reload.cause, detail=reason, **_by(reload.commands), **reload.changes)
        self._totals.note_reload(accepted=False)
        self._manager.ready()
        _answer(reload.commands, ReloadAnswer(False, reason, reload.changes))

    def _replace_workers(self) -> None:
        """Replace the current workers when all workers of the new configuration are ready."""
        reload = self._reload
        if reload is None or self._stopping:
            return
        if all(slot.worker is not None and slot.worker.ready for slot in reload.slots):
            old, self._slots = self._slots, reload.slots
            if reload.settings.database.url != self._settings.database.url:
                self._database = None
            self._settings, self._reload = reload.settings, None
            self._use_certificate(reload.certificate)
            for slot in reload.slots:
                if slot.worker is not None:
                    self._note_database(slot.worker)
            for slot in old:
                if slot.worker is not None:
                    self._retire(slot.worker)
            self._totals.configured = len(self._slots)
            self._replacing, self._replace_deadline = reload, time.monotonic() + _REPLACE_TIME
        elif reload.heartbeats > _TIMEOUT:
            steps = [slot.worker.step for slot in reload.slots if slot.worker is not None and not slot.worker.ready]
            step = f": one is still {steps[0]}" if steps else ""
            self._abort_reload(f"the new workers were not ready within {_TIMEOUT} seconds{step}")

    def _use_certificate(self, certificate: KeyPair | None) -> None:
        self._certificate = certificate
        self._totals.certificate_until = None
        if certificate is not None:
            found = Validity(certificate)
            if found.until is not None:
                self._totals.certificate_until = found.until.timestamp()
            if found.refused:
                log.warning("certificate_refused", reason=found.problem, action=RENEW)

    def _finish_reload(self) -> None:
        """Say that the new configuration is in use, once no replaced worker takes a request any more."""
        reload = self._replacing
        if reload is None:
            return
        busy = [worker.pid for worker in self._retiring if not worker.drained and not worker.channel_closed]
        if busy and not self._stopping and time.monotonic() < self._replace_deadline:
            return
        self._replacing = None
        self._totals.note_reload(accepted=True, last=not reload.overtaken)
        log.info(
            "reloaded",
            cause=reload.cause,
            **_by(reload.commands),
            users=len(reload.settings.users_by_name),
            pools=len(reload.settings.pools),
            workers=len(reload.slots),
            **({"revocations_held": len(self._held)} if len(self._held) else {}),
            **({"busy": busy} if busy else {}),
            **reload.changes,
        )
        self._manager.ready()
        detail = f"workers that still take requests: {', '.join(map(str, busy))}" if busy else ""
        _answer(reload.commands, ReloadAnswer(True, detail, reload.changes, reload.restart_needed))

    def _retire(self, worker: _Worker) -> None:
        """Stop a worker that was replaced."""
        self._retiring.add(worker)
        self._stop_worker(worker)

    def _stop(self, signal_name: str | None) -> None:
        """Stop listening and stop the workers, even if reporting the end of a reload fails."""
        self._stopping = True
        try:
            self._finish_reload()
        finally:
            self._stop_serving(signal_name)

    def _stop_serving(self, signal_name: str | None) -> None:
        for control in self._controls:
            self._selector.unregister(control)
            control.close()
        self._controls = ()
        self._manager.stopping()
        if signal_name is not None:
            log.info("stopping", signal=signal_name)
        stop_handshakes(self._listener)  # or a connection could enter the queue after the last worker has emptied it
        self._listener.close()
        for worker in list(self._workers()):
            self._stop_worker(worker)

    def _stop_worker(self, worker: _Worker) -> None:
        """Order a worker to stop, and set the time after which it is killed.

        A worker that has not reported yet is killed. Any other decides itself whether it has accepted anything: it may
        have become ready since its last report.
        """
        if not worker.reported:
            worker.kill()
            return
        worker.kill_at = time.monotonic() + (GRACE + _CLOSE_TIME if worker.ready else _STARTING_TIME)
        self._send([worker], Stop(replaced=not self._stopping))

    def _kill_overdue(self) -> None:
        """Kill the workers that have not stopped in time."""
        overdue = [worker for worker in self._workers() if worker.kill_at < time.monotonic()]
        if overdue:
            self._kill(overdue, "did not end in time")

    def _kill(self, workers: Iterable[_Worker], reason: str) -> None:
        killed = [worker for worker in workers if not worker.killed]
        for worker in killed:
            worker.kill()
        if any(worker.ready for worker in killed):
            log.warning("workers_killed", count=len(killed), reason=reason)
            if self._stopping:  # not for a worker that was replaced long before
                self._exit_code = self._exit_code or 1


def _by(commands: Iterable[Command]) -> Mapping[str, str]:
    """Return who ordered a reload, as a field of its event, if commands did."""
    names = dict.fromkeys(command.by for command in commands)
    return {"by": ", ".join(names)} if names else {}


def _answer(commands: Iterable[Command], answer: ReloadAnswer | Address | Sequence[Throttled]) -> None:
    for command in commands:
        command.answer(answer)
