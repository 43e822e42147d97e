"""The process that runs the command of `tokenauth run`, and kills it when the lease is over.

It does nothing else, so the command is killed in time also if `tokenauth run` is stopped, killed, or waits for the
network. The two talk over a socket: each line is a JSON list, of which the first element says what it is.
"""

import asyncio
import errno
import json
import math
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from tokenauth.clock import boottime

_NAP = 0.5
"""Seconds after which the clock is read again at the latest: a pause does not count the time of a suspended machine."""

_DYING = 0.2
"""Seconds that processes are given to end after SIGKILL, before the lease is over: a busy machine needs some.

Of a short lease it is a tenth.
"""

_GROUP_NAP = 0.05
"""Seconds between two looks at what is left of the process group of a command that has ended."""

_IGNORED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_PR_SET_PDEATHSIG = 1
_MISSING = {errno.ENOENT, errno.ENOTDIR}
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126  # as shells have it


class Ended(NamedTuple):
    """How the command ended."""

    status: int
    """Its exit status, or 128 + the signal that ended it."""
    lease_over: bool
    """Whether it was told to end because the lease was about to be over."""
    problem: str = ""
    """Why it could not be started, if so."""


class Command:
    """The command, as `tokenauth run` sees it: started, signalled and ended by another process, the guard."""

    def __init__(self, command: tuple[str, ...], terminal: "Terminal", *, kill: bool) -> None:
        """Fork the guard. Call this before threads are started. Without `kill`, the end of a lease kills nothing."""
        self._name = command[0]
        self._terminal = terminal
        self._group: int | None = None
        ignored = [number for number in _IGNORED if signal.getsignal(number) == signal.SIG_IGN]
        self._channel, other = socket.socketpair()
        if os.fork():
            other.close()
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # so that this can take the terminal back
            return
        try:
            self._channel.close()
            _Guard(other, command, terminal, ignored, kill=kill).run()
            os._exit(0)
        finally:
            os._exit(os.EX_SOFTWARE)

    def __str__(self) -> str:
        return self._name

    async def connect(self) -> None:
        """Call this before all else, and before a lease is taken."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._channel)

    async def run(self, environment: Mapping[str, str], ttl: float, lease_end: float, kill_after: float) -> Ended:
        """Run the command with these additional variables. Return when it has ended, and no lease is used any more.

        ttl: the length of the lease. lease_end: its end, by the clock `boottime`. kill_after: seconds between SIGTERM
        and SIGKILL.
        """
        asyncio.get_running_loop().add_signal_handler(signal.SIGTSTP, self.signal, signal.SIGTSTP)
        self._send("start", dict(environment), min(_DYING, ttl / 10), kill_after, lease_end)
        try:
            return await self._follow()
        except BaseException:
            self.signal(signal.SIGKILL)  # the caller is about to release the lease
            raise
        finally:
            self._terminal.take_back(self._group)
            self._writer.close()

    def extend(self, lease_end: float) -> None:
        """Let the command run until `lease_end`, unless it has been told to end."""
        self._send("extend", lease_end)

    def end(self) -> None:
        """Send SIGTERM now, and SIGKILL after the time that was given to `run`."""
        self._send("end")

    def signal(self, number: int) -> None:
        """Send a signal to the process group of the command."""
        self._send("signal", number)

    def _send(self, *message: object) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def _follow(self) -> Ended:
        lease_over = False
        while line := await self._reader.readline():
            match json.loads(line):
                case ["started", group]:
                    self._group = group
                case ["stopped", number]:
                    self._stop(number)
                case ["lease_over"]:
                    lease_over = True
                case ["failed", number]:
                    return Ended(_NOT_FOUND if number in _MISSING else _NOT_EXECUTABLE, lease_over, os.strerror(number))
                case ["ended", status]:
                    return Ended(status, lease_over)
        if self._group is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._group, signal.SIGKILL)
        return Ended(os.EX_SOFTWARE, lease_over, "The process that guards it has ended")

    def _stop(self, number: int) -> None:
        """Stop `tokenauth run` as its command was stopped, so that the shell gets the terminal back."""
        if number in {signal.SIGTTIN, signal.SIGTTOU} and self._terminal.give(self._group):
            self.signal(signal.SIGCONT)
            return
        had_terminal = self._terminal.take_back(self._group)
        if number == signal.SIGSTOP and not had_terminal:
            return
        loop = asyncio.get_running_loop()
        loop.remove_signal_handler(signal.SIGTSTP)
        os.kill(0, signal.SIGTSTP)
        # From here on, a shell has continued this process; or there is no shell that could, and it did not stop.
        loop.add_signal_handler(signal.SIGTSTP, self.signal, signal.SIGTSTP)
        if had_terminal:
            self._terminal.give(self._group)
        self.signal(signal.SIGCONT)


class Terminal:
    """The controlling terminal, which belongs to one process group at a time: the foreground group."""

    def __init__(self) -> None:
        self._group = os.getpgrp()
        self._descriptor = -1
        with suppress(OSError):
            self._descriptor = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        self.at_start = os.isatty(0) and os.isatty(1) and self.foreground() == self._group
        """Whether the command gets the terminal at its start.

        Else it gets it when it needs it: another program of a pipeline may read from the terminal.
        """

    def foreground(self) -> int | None:
        """Return the foreground group; None if there is no terminal."""
        try:
            return os.tcgetpgrp(self._descriptor)
        except OSError:
            return None

    def give(self, group: int | None) -> bool:
        """Give the terminal to a group, if it is in this process's. Return whether it was."""
        return group is not None and self._pass_on(self._group, group)

    def take_back(self, group: int | None) -> bool:
        """Take the terminal back from a group, if it has it. Return whether it had."""
        return group is not None and self._pass_on(group, self._group)

    def _pass_on(self, old: int, new: int) -> bool:
        if self.foreground() != old:
            return False
        with suppress(OSError):  # the group has ended, or the terminal was closed
            os.tcsetpgrp(self._descriptor, new)
        return True


class _Guard:
    def __init__(
        self,
        channel: socket.socket,
        command: tuple[str, ...],
        terminal: Terminal,
        ignored: Sequence[signal.Signals],
        *,
        kill: bool,
    ) -> None:
        self._channel = channel
        self._command = command
        self._terminal = terminal
        self._ignored = ignored
        self._kills = kill
        self._received = b""
        self._connected = True
        self._pid = 0
        self._status: int | None = None
        self._lease_end = math.inf
        self._dying = 0.0  # seconds from SIGKILL to the end of the lease
        self._notice = 0.0  # seconds from SIGTERM to the end of the lease
        self._lease_over = self._killed = False
        self._exec_errors = -1

    def run(self) -> None:
        os.setpgid(0, 0)  # signals for the group of `tokenauth run` are not for this process
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        woken, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        try:
            while not self._finished():
                sources = [woken, self._channel] if self._connected else [woken]
                ready = select.select(sources, [], [], self._pause())[0]
                self._enforce()  # first: a message that comes too late extends nothing
                if self._channel in ready:
                    self._receive()
                if woken in ready:
                    woken.recv(4096)
                    self._reap()
                self._enforce()
            self._report()
        except BaseException:
            self._signal(signal.SIGKILL)
            raise

    def _pause(self) -> float | None:
        if self._pid == 0 or self._killed:
            return None
        nap = _NAP if self._status is None else _GROUP_NAP
        due = self._lease_end - (self._dying if self._lease_over else self._notice)
        if due == math.inf:
            return None if self._status is None else nap
        return max(0.0, min(nap, due - boottime()))

    def _enforce(self) -> None:
        """Send SIGTERM when the end of the lease is near, and SIGKILL just before it."""
        now = boottime()
        if not self._lease_over and now >= self._lease_end - self._notice:
            self._lease_over = True
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)  # so that a stopped process gets it
            self._send("lease_over")
        if self._lease_over and not self._killed and now >= self._lease_end - self._dying:
            self._killed = True
            self._signal(signal.SIGKILL)

    def _finished(self) -> bool:
        """Whether there is nothing left to guard."""
        if self._status is None:
            return not self._connected and (self._pid == 0 or not self._kills)
        return not self._lease_over or self._killed or not self._group_exists()

    def _group_exists(self) -> bool:
        """Return whether processes that the command started are left in its group."""
        try:
            os.killpg(self._pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # they run as another user
            pass
        return True

    def _receive(self) -> None:
        data = b""
        with suppress(ConnectionError):
            data = self._channel.recv(65536)
        if not data:
            self._disconnect()
            return
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            match json.loads(line):
                case ["start", environment, dying, kill_after, lease_end]:
                    self._dying, self._notice = dying, dying + kill_after
                    self._start(environment)
                    self._set_end(lease_end)
                case ["extend", lease_end]:
                    self._set_end(lease_end)
                case ["end"]:
                    self._end()
                case ["signal", number]:
                    self._signal(number)

    def _set_end(self, lease_end: float) -> None:
        if self._kills and not self._lease_over:
            self._lease_end = lease_end

    def _end(self) -> None:
        """End the command as if the lease were about to be over."""
        self._set_end(min(self._lease_end, boottime() + self._notice))

    def _disconnect(self) -> None:
        """End the command: `tokenauth run` was killed, and the lease is no longer kept alive."""
        self._connected = False
        self._end()

    def _start(self, environment: dict[str, str]) -> None:
        self._exec_errors, errors = os.pipe()
        dies_with_parent = _death_signal() if self._kills else None
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)  # until the new process does not ignore them
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.setpgid(0, 0)
                if self._terminal.at_start:
                    self._terminal.give(os.getpid())
                for number in {*_IGNORED, signal.SIGPIPE, signal.SIGXFSZ} - {*self._ignored}:
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                if dies_with_parent is not None:
                    dies_with_parent()
                os.execvpe(self._command[0], self._command, {**os.environ, **environment})  # noqa: S606 # no shell is what is wanted
            except OSError as error:
                os.write(errors, b"%d" % (error.errno or 0))
            finally:
                os._exit(127)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(errors)
        with suppress(OSError):  # the command did it first
            os.setpgid(self._pid, self._pid)
        self._send("started", self._pid)

    def _reap(self) -> None:
        while self._pid and self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG | os.WUNTRACED)
            if pid == 0:
                return
            if os.WIFSTOPPED(status):
                self._send("stopped", os.WSTOPSIG(status))
            else:
                code = os.waitstatus_to_exitcode(status)
                self._status = code if code >= 0 else 128 - code

    def _report(self) -> None:
        if self._status is None:
            return
        error = os.read(self._exec_errors, 16)
        self._send("failed", int(error)) if error else self._send("ended", self._status)
        # Closing the socket while there is something to read would be a reset, which discards what was sent.
        with suppress(OSError):
            while self._channel.recv(4096):
                pass

    def _signal(self, number: int) -> None:
        if self._pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, number)

    def _send(self, *message: object) -> None:
        with suppress(OSError):  # `tokenauth run` was killed
            self._channel.sendall(json.dumps(message).encode() + b"\n")


def _death_signal() -> Callable[[], object] | None:
    """Return what makes Linux kill the calling process when its parent ends, in case all others are killed at once."""
    if sys.platform != "linux":
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
