"""The main process: starts the workers, replaces those that end, and hands a changed configuration to new ones.

Nothing that happens here ends it but a signal, or a first start that fails. It never waits for anything but the next
event, so that signals are obeyed at once, whatever else goes on.
"""

import errno
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import msgspec
from msgspec.structs import replace

from tokenauth import logs
from tokenauth.errors import ConfigError
from tokenauth.logs import log
from tokenauth.revocation_queue import HeldRevocations, RevocationUpdate
from tokenauth.server.acceptor import stop_handshakes
from tokenauth.server.channel import Channel
from tokenauth.server.worker import BEAT, GRACE, ChangeUsers, Order, Report, Serve, Stop, encode
from tokenauth.settings.model import Settings

START_FAILED = 3
"""The exit code when the first start fails."""

_TICK = 1.0
"""Seconds after which the main process looks around without an event."""

_PATIENCE = 60
"""Ticks without a sign of life after which a worker is killed, and ticks that a reload may take."""

_MARGIN = 10.0
"""Seconds after GRACE in which a worker closes its store, before it is killed."""

_HEALTHY = 10.0
"""Seconds for which a worker must serve so that its end is not counted with the one before it."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds between two tries to start a worker: they grow by half each time."""

_MAX_SAID = 8192
"""Bytes that are kept of what a Python says that cannot start."""

_ONCE = 1.0
"""Seconds in which signals to stop count as one: `timeout` and some process managers send it twice."""

_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


class Interrupted(BaseException):
    """A signal has come that is not to wait for what goes on."""


class Signals:
    """Collects signals, and wakes up whoever waits for `fileno` to be readable."""

    def __init__(self) -> None:
        self._caught: list[signal.Signals] = []
        self._interrupting: frozenset[signal.Signals] = frozenset()
        self._here, self._wake = socket.socketpair()
        self._here.setblocking(False)
        self._wake.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._here.fileno()

    def catch(self, *numbers: signal.Signals) -> None:
        """Collect these signals from now on."""
        for number in numbers:
            signal.signal(number, self._remember)

    def take(self) -> Sequence[signal.Signals]:
        """Return what was caught since the last call, in order."""
        with suppress(BlockingIOError):
            while self._here.recv(4096):
                pass
        caught, self._caught = self._caught, []  # a signal in between is in one of them
        return caught

    def close(self) -> None:
        """Wake up nobody any more."""
        self._here.close()
        self._wake.close()

    @contextmanager
    def interrupting(self, *numbers: signal.Signals) -> Iterator[None]:
        """Have these signals raise Interrupted, besides being collected, in what may take long."""
        self._interrupting = frozenset(numbers)
        try:
            yield
        finally:
            self._interrupting = frozenset()

    def _remember(self, number: int, _: FrameType | None) -> None:
        found = signal.Signals(number)
        self._caught.append(found)
        if found in self._interrupting:
            self._interrupting = frozenset()
            raise Interrupted


class _Worker:
    """A worker process, as the main process sees it."""

    def __init__(self, listener: socket.socket, log_fd: int) -> None:
        """Start it; it waits for its first order. Raises OSError."""
        self.starting = False
        self.ready = False
        self.kill_at = math.inf
        self.silent = 0
        self.began = time.monotonic()
        self.failure: Report | None = None
        self.killed = False
        self._said = b""
        here, there = socket.socketpair()
        self.said, saying = -1, -1
        try:
            self.said, saying = os.pipe()
            os.set_blocking(self.said, False)
            given = (there.fileno(), listener.fileno(), log_fd)
            self._process = _start_python(given, saying)
        except BaseException:
            here.close()
            self.close_said()
            raise
        finally:
            there.close()
            if saying >= 0:
                os.close(saying)
        self.channel = Channel(here)

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Return how it ended, or None while it runs."""
        return self._process.poll()

    def read_said(self) -> bool:
        """Read what it has written to standard error before its log is set up; return False at the end of that."""
        try:
            while data := os.read(self.said, _MAX_SAID):
                self._said = (self._said + data)[-_MAX_SAID:]
        except BlockingIOError:
            return True
        return False

    def close_said(self) -> None:
        """Close the pipe of its standard error."""
        if self.said >= 0:
            os.close(self.said)
            self.said = -1

    def last_words(self) -> str:
        """Return the last line that it wrote before its log was set up; one about an error, if there is one."""
        lines = [line.strip() for line in self._said.decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return (errors or lines or [""])[-1]

    def why(self) -> str:
        """Say why it ended."""
        if self.failure is not None:
            return self.failure.reason
        code = self.exit_code() or 0
        if code < 0:
            with suppress(ValueError):
                return f"ended by {signal.Signals(-code).name}"
        return self.last_words() or f"ended with exit code {code}"

    def kill(self) -> None:
        """End it at once."""
        self.killed = True
        self._process.kill()


def _start_python(given: tuple[int, int, int], standard_error: int) -> subprocess.Popen[bytes]:
    """Start a Python that runs a worker with these descriptors. Raises OSError.

    The signals that concern the main process are blocked in the child until it ignores them.
    """
    program = "from tokenauth.server.worker import spawn_main; spawn_main({}, {}, {})".format(*given)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return subprocess.Popen(  # noqa: S603  (this Python, and three numbers)
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.DEVNULL,
            stderr=standard_error,
            pass_fds=given,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Place:
    """A place for one worker: the one that is there, or when the next try to start one is due."""

    def __init__(self) -> None:
        self.worker: _Worker | None = None
        self.due = 0.0
        self._pause = 0.0

    def postpone(self, least: float = 0.0) -> float:
        """Return the seconds until the next try: none or `least` at first, then pauses that grow."""
        pause = max(self._pause, least)
        self._pause = min(max(_FIRST_PAUSE, pause * 1.5), _LONGEST_PAUSE)
        self.due = time.monotonic() + pause
        return round(pause, 1)

    def vacate(self, served: float) -> float:
        """Let go of a worker that has served for some seconds; return the seconds until the next is started."""
        self.worker = None
        if served >= _HEALTHY:
            self._pause = 0.0
        return self.postpone()


class _Reload:
    """A configuration that is to be served, and the workers that will do so when all of them are ready."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.places = [_Place() for _ in range(settings.server.workers)]
        self.ticks = 0


class Supervisor:
    """Keeps the workers of one configuration serving, and replaces all of them by those of another."""

    def __init__(
        self, path: Path, settings: Settings, reread: Callable[[], Settings], listener: socket.socket, signals: Signals
    ) -> None:
        """Serve `settings`, which were read from `path`, on the listener; `reread` them at SIGHUP.

        `reread` raises ConfigError for what cannot be served.
        """
        self._path = path
        self._settings = settings
        self._users = settings.directory
        self._reread = reread
        self._listener = listener
        self._signals = signals
        self._log_fd = _duplicate_of_standard_error()
        self._selector = selectors.PollSelector()  # it needs no descriptor of its own
        self._selector.register(signals, selectors.EVENT_READ)
        self._places = [_Place() for _ in range(settings.server.workers)]
        self._reload: _Reload | None = None
        self._retiring: set[_Worker] = set()
        self._held = HeldRevocations()
        self._served = False
        self._stopping = False
        self._told_to_stop = -math.inf
        self._exit_code = 0
        self._ticked = time.monotonic()
        self._troubled = False
        self._ready: list[tuple[selectors.SelectorKey, int]] = []

    def run(self) -> int:
        """Serve until a signal or a failed first start; return the exit code.

        Each step goes on without the others: whatever fails in one of them, signals are obeyed and ends are seen.
        """
        steps = (self._obey, self._hear, self._tick, self._bury, self._start, self._switch, self._enforce)
        while not self._stopping or any(True for _ in self._workers()):
            for step in (self._wait, *steps):
                try:
                    step()
                except Exception as error:
                    self._troubled = True
                    with suppress(Exception):
                        log.error("main_process_failed", step=step.__name__.strip("_"), reason=logs.describe(error))
        self._held.log_lost()
        return self._exit_code

    def _workers(self) -> Iterator[_Worker]:
        """Go through all workers that have not ended."""
        coming = self._reload.places if self._reload is not None else []
        for place in (*self._places, *coming):
            if place.worker is not None:
                yield place.worker
        yield from tuple(self._retiring)

    def _wait(self) -> None:
        """Wait for the next event, or for the time when something is due; after trouble, for no more than a signal."""
        self._ready = []
        if self._troubled:
            self._troubled = False
            with suppress(OSError):
                _wait_for(self._signals, _FIRST_PAUSE)
        now = time.monotonic()
        due = min([now + _TICK, *(place.due for place in self._vacant())])
        self._ready = self._selector.select(max(0.0, due - now))

    def _vacant(self) -> list[_Place]:
        """List the places that need a worker."""
        if self._stopping:
            return []
        places = [*self._places, *(self._reload.places if self._reload is not None else [])]
        return [place for place in places if place.worker is None]

    def _obey(self) -> None:
        for number in self._signals.take():
            if number in {signal.SIGTERM, signal.SIGINT}:
                now = time.monotonic()
                if not self._stopping:
                    self._told_to_stop = now
                    self._stop(number.name)
                elif now >= self._told_to_stop + _ONCE:
                    self._kill(self._workers(), f"a second signal: {number.name}")
            elif number == signal.SIGHUP and not self._stopping:
                self._begin_reload()

    def _hear(self) -> None:
        """Read what the workers say, and write what they have not had room for."""
        ready, self._ready = self._ready, []  # what is left of a wait that failed is out of date
        for key, events in ready:
            if isinstance(key.data, _Worker):
                worker = key.data
                if key.fileobj is not worker.channel:
                    if not worker.read_said():
                        self._hang_up(worker)
                    continue
                if events & selectors.EVENT_WRITE:
                    worker.channel.flush()
                    self._watch(worker)
                if events & selectors.EVENT_READ:
                    self._take_reports(worker)

    def _take_reports(self, worker: _Worker) -> None:
        try:
            reports = [msgspec.msgpack.decode(each, type=Report) for each in worker.channel.receive()]
        except EOFError:  # it is about to end
            self._selector.unregister(worker.channel)
            return
        if not reports:
            return
        worker.silent = 0
        if not worker.starting and worker.last_words() and reports[0].state != "failed":
            log.warning("worker_said", pid=worker.pid, detail=worker.last_words())
        worker.starting = True
        for report in reports:
            if report.state == "failed":
                worker.failure = report
            elif report.state == "ready":
                worker.ready = True
                worker.began = time.monotonic()
                if worker.kill_at < math.inf:
                    worker.kill_at = worker.began + GRACE + _MARGIN
                self._served = True
            if report.revocations is not None:
                self._share(report.revocations, worker)

    def _share(self, update: RevocationUpdate, source: _Worker) -> None:
        """Pass on what a worker holds, so that all others refuse it too."""
        self._held.apply(update)
        if update.held or update.dropped or update.all_revoked_at:
            self._send([worker for worker in self._workers() if worker is not source], replace(update, written=[]))

    def _send(self, workers: Iterable[_Worker], order: Order) -> None:
        encoded = encode(order)
        for worker in workers:
            worker.channel.send(encoded)
            self._watch(worker)

    def _watch(self, worker: _Worker) -> None:
        """Wait for a worker's channel: always to read from it, to write to it only as long as something is left."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.channel.pending else 0)
        with suppress(KeyError):  # it has hung up
            self._selector.modify(worker.channel, events, worker)

    def _hang_up(self, worker: _Worker) -> None:
        """Close the pipe of a worker's standard error: it has set up its log, or has ended."""
        if worker.said >= 0:
            with suppress(KeyError):
                self._selector.unregister(worker.said)
            worker.close_said()

    def _tick(self) -> None:
        """Count the seconds of this process, not the clock's: nobody is blamed for a machine that was suspended."""
        if time.monotonic() - self._ticked < BEAT:
            return
        self._ticked = time.monotonic()
        if self._reload is not None:
            self._reload.ticks += 1
        for worker in self._workers():
            worker.silent += 1
            if worker.silent > _PATIENCE and not worker.killed:
                worker.failure = Report("failed", f"gave no sign of life for {_PATIENCE} seconds")
                worker.kill()

    def _bury(self) -> None:
        """See which workers have ended, and what follows from that."""
        for worker in list(self._workers()):
            code = worker.exit_code()
            if code is not None:
                self._forget(worker)
                self._ended(worker, code)

    def _forget(self, worker: _Worker) -> None:
        """Read the last words of a worker that has ended, and let go of its descriptors."""
        with suppress(Exception):  # without memory they cannot be read, and the worker has ended all the same
            self._take_reports(worker)
            if worker.said >= 0:
                worker.read_said()
        self._hang_up(worker)
        with suppress(KeyError):
            self._selector.unregister(worker.channel)
        worker.channel.close()

    def _ended(self, worker: _Worker, code: int) -> None:
        served = time.monotonic() - worker.began if worker.ready else 0.0
        ending = (self._stopping and self._exit_code != START_FAILED) or worker in self._retiring
        if ending and code and (worker.failure is not None or not worker.killed):
            log.error("worker_failed", exit_code=code, reason=worker.why())
        if worker in self._retiring:
            self._retiring.discard(worker)
            return
        if self._reload is not None:
            for place in self._reload.places:
                if place.worker is worker:
                    place.worker = None
                    if not self._stopping:
                        self._abort_reload(worker.why(), worker.failure)
                    return
        for place in self._places:
            if place.worker is worker:
                if self._stopping:
                    place.worker = None
                elif not self._served:
                    place.worker = None
                    self._give_up(worker.why(), worker.failure)
                else:
                    pause = place.vacate(served)
                    log.error("worker_replaced", exit_code=code, reason=worker.why(), again_in=pause)

    def _start(self) -> None:
        """Start the workers that are due."""
        for place in self._vacant():
            if place.due > time.monotonic():
                continue
            try:
                place.worker = self._start_worker(place in self._places)
            except Exception as error:  # no descriptors, no memory, no interpreter: that may pass
                reason = f"cannot start a worker: {logs.describe(error)}"
                if not self._served:
                    self._give_up(reason)
                    return
                log.error("worker_not_started", reason=reason, again_in=place.postpone(_FIRST_PAUSE))

    def _start_worker(self, current: bool) -> _Worker:
        """Start a worker for the configuration that is served, or for the one that will be."""
        settings = self._settings
        if self._reload is not None:
            users = self._reload.settings.users
            settings = replace(settings, users=users) if current else self._reload.settings
        order = encode(Serve(self._path, settings, self._held.snapshot()))
        worker = _Worker(self._listener, self._log_fd)
        try:
            self._selector.register(worker.channel, selectors.EVENT_READ, worker)
            self._selector.register(worker.said, selectors.EVENT_READ, worker)
            worker.channel.send(order)
            self._watch(worker)
        except BaseException:
            worker.kill()
            self._forget(worker)
            raise
        return worker

    def _give_up(self, reason: str, failure: Report | None = None) -> None:
        """End a first start that has failed."""
        event = "configuration_refused" if failure is not None and failure.configuration else "start_failed"
        log.critical(event, detail=reason)
        self._exit_code = START_FAILED
        self._stop(None)

    def _begin_reload(self) -> None:
        """Read the configuration, and start workers for it beside the present ones, which get its users at once."""
        try:
            with self._signals.interrupting(signal.SIGTERM, signal.SIGINT):
                settings = self._reread()
        except Interrupted:
            return
        except ConfigError as error:
            log.error("configuration_refused", detail=str(error))
            return
        except Exception as error:
            log.error("configuration_refused", detail=f"{self._path}: cannot be read: {logs.describe(error)}")
            return
        self._drop_reload()
        self._reload = _Reload(settings)
        self._tell_users(settings)

    def _tell_users(self, settings: Settings) -> None:
        """Have the present workers, and those that end, go on with the users of this configuration."""
        before, users = self._users, settings.directory
        changed = {name: user for name, user in users.items() if before.get(name) != user}
        self._users = users
        present = [place.worker for place in self._places if place.worker is not None]
        removed = [name for name in before if name not in users]
        self._send((*present, *self._retiring), ChangeUsers(removed, changed))

    def _drop_reload(self) -> None:
        """Kill the workers that were to come: they may have begun to answer, and go as those that are replaced."""
        reload, self._reload = self._reload, None
        for place in reload.places if reload is not None else ():
            if place.worker is not None:
                self._retire(place.worker)

    def _abort_reload(self, reason: str, failure: Report | None = None) -> None:
        """Keep what was served before."""
        self._drop_reload()
        self._tell_users(self._settings)
        refused = failure is not None and failure.configuration
        log.error("configuration_refused" if refused else "reload_failed", detail=reason)

    def _switch(self) -> None:
        """Replace the present workers when all those of a new configuration are ready."""
        reload = self._reload
        if reload is None or self._stopping:
            return
        if all(place.worker is not None and place.worker.ready for place in reload.places):
            past, self._places = self._places, reload.places
            self._settings, self._reload = reload.settings, None
            for place in past:
                if place.worker is not None:
                    self._retire(place.worker)
            users, pools = len(self._settings.directory), len(self._settings.pools)
            held = {"revocations_held": len(self._held)} if len(self._held) else {}
            log.info("configuration_reloaded", users=users, pools=pools, workers=len(self._places), **held)
        elif reload.ticks > _PATIENCE:
            self._abort_reload(f"the new workers were not ready within {_PATIENCE} seconds")

    def _retire(self, worker: _Worker) -> None:
        """Have a worker end that was replaced."""
        self._retiring.add(worker)
        self._end(worker)

    def _stop(self, signal_name: str | None) -> None:
        """Stop listening, and end the workers."""
        self._stopping = True
        if signal_name is not None:
            log.info("stopping", signal=signal_name)
        stop_handshakes(self._listener)  # or some would enter the queue after the last worker has looked
        self._listener.close()
        for worker in list(self._workers()):
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        """Have a worker take no more connections, answer what it has accepted, and end; kill it if it does not.

        One that does not serve yet ends at once. It may have begun to since it last reported, so it is asked.
        """
        if not worker.starting:
            worker.kill()
            return
        worker.kill_at = time.monotonic() + (GRACE + _MARGIN if worker.ready else _TICK)
        self._send([worker], Stop(replaced=not self._stopping))

    def _enforce(self) -> None:
        """Kill the workers that should have ended by now."""
        late = [worker for worker in self._workers() if worker.kill_at < time.monotonic()]
        if late:
            self._kill(late, "did not end in time")

    def _kill(self, workers: Iterable[_Worker], reason: str) -> None:
        killed = [worker for worker in workers if not worker.killed]
        for worker in killed:
            worker.kill()
        if any(worker.ready for worker in killed):
            log.warning("workers_killed", count=len(killed), reason=reason)
            self._exit_code = self._exit_code or 1


def _wait_for(signals: Signals, seconds: float) -> None:
    with selectors.PollSelector() as selector:
        selector.register(signals, selectors.EVENT_READ)
        selector.select(seconds)


def _duplicate_of_standard_error() -> int:
    """Return a descriptor of the log for the workers; of nothing, where standard error is closed. Raises OSError."""
    try:
        return os.dup(2)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return os.open(os.devnull, os.O_WRONLY)
