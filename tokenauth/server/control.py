"""How `tokenauth reload` and `tokenauth throttle` find the servers of a configuration, and get their answers.

For each of the two, a main process listens on a Unix socket without a file (Linux's abstract namespace). Its name is
made of the directory and the name of the configuration file, and of the process. So nothing is left behind by a killed
server, and the database may be anywhere. Both sides ask the kernel which user is at the other end.
"""

import os
import pwd
import re
import socket
import stat
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec

from tokenauth import logs
from tokenauth.errors import ConfigError, StartError
from tokenauth.models import Throttled

AVAILABLE = sys.platform == "linux"

_ANSWER_TIME = 150.0
"""Seconds to wait for an answer. A reload takes at most a minute, and waits for one that is under way."""

_CONNECT_TIME = 3.0
"""Seconds in which a server must take a connection: a program of another user can listen under its name."""

_COMMAND = "tokenauth-command-"
"""How the addresses of commands begin."""

_MAX_ADDRESS = 100
"""Bytes of an address; the kernel allows 108."""

_MAX_WAITING = 16
"""Commands that can wait for the same answer."""

_Answer = TypeVar("_Answer")

_CREDENTIALS = struct.Struct("3i")


Purpose = Literal["reload", "throttle", "address"]
"""What a command asks for: a reload, who is throttled, or where the server listens."""


class ReloadAnswer(msgspec.Struct):
    """The answer of a server to `tokenauth reload`."""

    accepted: bool
    detail: str
    """Why it was refused, or what is not as it should be after it."""
    changes: Mapping[str, Sequence[str]]
    """Names of users, pools and settings by kind of change."""
    restart_needed: Sequence[str] = []
    """What has changed in the file and is not in use before a restart."""


class Address(msgspec.Struct):
    """Where a server listens: on a port, with or without TLS, or on a Unix socket."""

    host: str
    port: int
    tls: bool
    socket: str


class Peer(NamedTuple):
    """The process at the other end of a connection, as the kernel knows it."""

    pid: int
    uid: int

    @classmethod
    def of(cls, connection: socket.socket) -> "Peer":
        """Return the peer. It does not matter whether it still exists. Raises OSError on other systems than Linux."""
        if sys.platform != "linux":
            raise OSError("the peer of a socket is known on Linux only")
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(found)
        return cls(pid, uid)


class Command:
    """A command that waits for an answer."""

    def __init__(self, connection: socket.socket, by: str) -> None:
        """Answer on this connection. by: the operator's login name."""
        connection.setblocking(False)
        self.by = by
        self._connection = connection
        self._unsent = memoryview(b"")
        self.closed = False

    def answer(self, answer: ReloadAnswer | Address | Sequence[Throttled]) -> None:
        """Send the answer, now or at a later `flush`, and close the connection."""
        self._unsent = memoryview(msgspec.json.encode(answer))
        self.flush()

    def flush(self) -> None:
        """Send as much of the answer as the socket accepts now: no command can block the main process."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
                if not self._unsent:
                    self.close()
        except BlockingIOError:
            pass
        except OSError:  # the command has ended
            self.close()

    def close(self) -> None:
        self._unsent = memoryview(b"")
        self._connection.close()
        self.closed = True


class Control:
    """The end of the main process: accepts commands that ask for one thing."""

    def __init__(self, path: Path, purpose: Purpose = "reload") -> None:
        """Listen for commands that name this configuration file. Raises OSError."""
        self.purpose = purpose
        self._commands: list[Command] = []
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(f"\0{_prefix(path, purpose)}{os.getpid()}")
            self._listener.listen(_MAX_WAITING)
            self._listener.setblocking(False)
        except BaseException:
            self._listener.close()
            raise

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> Sequence[Command]:
        """Accept the commands of root and of this user that have arrived. Raises OSError if descriptors are short.

        It looks at _MAX_WAITING connections: any user can make more all the time, and the main process has other work.
        """
        accepted: list[Command] = []
        with suppress(BlockingIOError, ConnectionError):  # none is left, or it has gone
            for _ in range(_MAX_WAITING):
                connection, address = self._listener.accept()
                uid = Peer.of(connection).uid
                if uid in {0, os.geteuid()} and len(self._commands) < _MAX_WAITING:
                    accepted.append(Command(connection, _operator(address) or logs.name_of(uid)))
                    self._commands.append(accepted[-1])
                else:
                    connection.close()
        return accepted

    def flush(self) -> None:
        """Send what is left of answers. To be called now and then."""
        for command in self._commands:
            command.flush()
        self._commands = [command for command in self._commands if not command.closed]

    def close(self) -> None:
        """Stop listening. Commands that still wait get no answer."""
        self._listener.close()
        for command in self._commands:
            command.close()


def find_servers(path: Path) -> Sequence[int]:
    """Return the process IDs of the servers of a configuration file; none on other systems than Linux.

    None of them is asked: it may be a program of another user that only listens under such a name.
    """
    if not AVAILABLE:
        return []
    prefix = _prefix(path, "reload")
    return [int(name.removeprefix(prefix)) for name in _names(prefix)]


def describe_others(path: Path) -> str:
    """Return which servers of this user, or of anyone for root, serve other configuration files; "" if none does."""
    own, found = _prefix(path, "reload"), set()
    for prefix, pid in re.findall(r" @(tokenauth-reload-[0-9a-f]{32}-)(\d+)$", _sockets(), re.MULTILINE):
        with suppress(OSError):
            if prefix != own and os.geteuid() in {0, os.stat(f"/proc/{pid}").st_uid}:
                found.add(pid)
    if not found:
        return ""
    shown = ", ".join(sorted(found)[:3]) + ("..." if len(found) > 3 else "")
    return f"process {shown} serves another file" if len(found) == 1 else f"processes {shown} serve other files"


def ask_for_reload(path: Path) -> Mapping[int, ReloadAnswer]:
    """Have each running server of a configuration file reload it. Return the answers by process ID.

    Raises StartError if there is none, if one cannot be asked, and if one ends before it answers.
    """
    if not AVAILABLE:
        raise StartError("`tokenauth reload` works on Linux only; run `kill -HUP PID` instead, and look at the log.")
    return _ask_all(path, "reload", ReloadAnswer)


def ask_who_is_throttled(path: Path) -> Sequence[Throttled]:
    """Return whom the running servers of a configuration file have refused, and who may still have to wait.

    Raises StartError if there is no server, or if one does not answer.
    """
    if not AVAILABLE:
        raise StartError("The list of throttled logins works on Linux only; use GET /api/throttle instead.")
    return [each for answer in _ask_all(path, "throttle", list[Throttled]).values() for each in answer]


def find_address(path: Path, seconds: float) -> Address | None:
    """Return where a running server of a configuration file listens; None if none says so within `seconds`.

    The file may have changed since the server has read it, also to one that cannot be used.
    """
    if not AVAILABLE:
        return None
    try:
        return next(iter(_ask_all(path, "address", Address, seconds).values()))
    except (StartError, OSError):
        return None


def _ask_all(path: Path, purpose: Purpose, type: type[_Answer], seconds: float = _ANSWER_TIME) -> Mapping[int, _Answer]:
    """Return the answers of the servers of a configuration file, by process ID. Raises StartError."""
    prefix = _prefix(path, purpose)
    answers: dict[int, bytes] = {}
    names = [name for name in _names(prefix) if not _ask(name, path, answers, seconds)]
    deadline = time.monotonic() + min(_CONNECT_TIME, seconds)
    while names and time.monotonic() < deadline:
        time.sleep(0.05)
        names = [name for name in names if not _ask(name, path, answers, seconds)]
    if not answers:
        busy = " One, of whatever user, takes no more connections." if names else ""
        others = describe_others(path)
        why = f"{others[0].upper()}{others[1:]}: name that one with --config." if others else _OLDER
        raise StartError(f"No server of this user serves {path}: start one with `tokenauth serve`. {why}{busy}")
    return {pid: _decode(pid, data, type) for pid, data in answers.items()}


_OLDER = "If one runs, it is of another release: restart it."


def _ask(name: str, path: Path, answers: dict[int, bytes], seconds: float) -> bool:
    """Note the answer of a server under its process ID, if it is ours. Return False if its queue is full for now."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        with suppress(OSError):  # then the server knows only as which user this runs
            connection.bind(_address(name))
        try:
            connection.connect(f"\0{name}")
            peer = Peer.of(connection)
            if _is_ours(peer, path):
                answers[peer.pid] = _receive(connection)
        except BlockingIOError:
            return False
        except ConnectionRefusedError:  # it has just ended
            pass
        except TimeoutError:
            raise StartError(f"The server has not answered within {seconds:.0f} seconds.") from None
    return True


def _address(server: str) -> bytes:
    """Return an address for the end of the command. It tells the server who runs it, before anything is sent."""
    unique = f"\0{_COMMAND}{os.getpid()}-{server.rpartition('-')[2]}-"
    return f"{unique}{logs.operator()}".encode(errors="surrogateescape")[:_MAX_ADDRESS]


def _operator(address: bytes | str) -> str:
    """Return who runs the command at this address, or ""."""
    text = address.decode(errors="replace") if isinstance(address, bytes) else address
    if not text.startswith(f"\0{_COMMAND}"):
        return ""
    return text.removeprefix(f"\0{_COMMAND}").split("-", 2)[-1]


def _receive(connection: socket.socket) -> bytes:
    data = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    return data


def _decode(pid: int, data: bytes, type: type[_Answer]) -> _Answer:
    try:
        return msgspec.json.decode(data, type=type)
    except msgspec.DecodeError:  # nothing, or a part
        message = f"The server with process {pid} has ended, or does not take orders of this user."
        raise StartError(message) from None


def _prefix(path: Path, purpose: Purpose) -> str:
    """Return how the names of a configuration's sockets begin: links of the file itself are not followed.

    Raises ConfigError.
    """
    path = path.absolute()
    try:
        directory = path.parent.stat()
    except OSError as error:
        raise ConfigError(f"{path.parent}: {error.strerror}") from None
    digest = sha256(f"{directory.st_dev} {directory.st_ino} {path.name}".encode(errors="surrogateescape")).hexdigest()
    return f"tokenauth-{purpose}-{digest[:32]}-"


def _sockets() -> str:
    return Path("/proc/net/unix").read_text(errors="surrogateescape")


def _names(prefix: str) -> Sequence[str]:
    """Return the names of listening sockets that begin with the prefix."""
    found = [line.rpartition(" @")[2] for line in _sockets().splitlines() if f" @{prefix}" in line]
    return sorted({name for name in found if name.removeprefix(prefix).isdigit()})


def _is_ours(peer: Peer, path: Path) -> bool:
    """Return whether a server is one of this user. Root trusts each user who may read the configuration.

    Any other local program could listen under the same name.
    """
    if peer.uid == os.geteuid():
        return True
    if os.geteuid() != 0:
        return False
    found = path.stat()
    try:
        user = pwd.getpwuid(peer.uid)
        groups = os.getgrouplist(user.pw_name, user.pw_gid)
    except KeyError:  # a user of a container
        groups = []
    if found.st_uid == peer.uid:
        return bool(found.st_mode & stat.S_IRUSR)
    return bool(found.st_mode & (stat.S_IRGRP if found.st_gid in groups else stat.S_IROTH))
