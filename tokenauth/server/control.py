"""How `tokenauth reload` and `tokenauth throttle` find the servers of a configuration, and get their answers.

For each of the two, a main process listens on a Unix socket without a file (Linux's abstract namespace). Its name is
made of the directory and the name of the configuration file, and of the process. So nothing is left behind by a killed
server, and the database may be anywhere. Both sides ask the kernel which user is at the other end.
"""

import os
import pwd
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import msgspec

from tokenauth.errors import ConfigError, StartError
from tokenauth.models import Throttled

AVAILABLE = sys.platform == "linux"

_ANSWER_TIME = 150.0
"""Seconds to wait for an answer. A reload takes at most a minute, and waits for one that is under way."""

_CONNECT_TIME = 3.0
"""Seconds in which a server must take a connection: a program of another user can listen under its name."""

_THROTTLE = "throttle-"

_MAX_WAITING = 16
"""Commands that can wait for the same answer."""

_CREDENTIALS = struct.Struct("3i")


class Answer(msgspec.Struct):
    """What a server says after a reload. `changes` are names of users, pools and settings by kind."""

    accepted: bool
    detail: str
    changes: Mapping[str, Sequence[str]]


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


class Control:
    """The end of the main process: commands that ask for a reload, and wait for the answer."""

    def __init__(self, path: Path) -> None:
        """Listen for commands that name this configuration file. Raises OSError."""
        self._asking: list[socket.socket] = []
        self._waiting: list[socket.socket] = []
        self._listener = _listen(_prefix(path))

    def fileno(self) -> int:
        return self._listener.fileno()

    def take(self) -> bool:
        """Accept the commands that have arrived; return whether there were any of root or of this user.

        Then call `started` once a reload has begun, or `refuse` if it cannot begin. Raises OSError if descriptors are
        short.
        """
        for connection in _accept(self._listener):
            if len(self._asking) < _MAX_WAITING:
                self._asking.append(connection)
            else:
                connection.close()
        return bool(self._asking)

    def started(self) -> None:
        """Note that a reload has begun, which also replaces one that was under way: all wait for its end."""
        self._waiting += self._asking
        self._asking = []

    def refuse(self, answer: Answer) -> None:
        """Answer those whose reload could not begin. One that is under way goes on."""
        asking, self._asking = self._asking, []
        _answer(asking, msgspec.json.encode(answer))

    def end(self, answer: Answer) -> None:
        """Answer those who wait for the end of the reload."""
        waiting, self._waiting = self._waiting, []
        _answer(waiting, msgspec.json.encode(answer))

    def stop(self) -> None:
        """Close the connections of all that wait: they get no answer."""
        for connection in (*self._asking, *self._waiting):
            connection.close()
        self._asking, self._waiting = [], []


class ThrottleControl:
    """The end of the main process: commands that ask who is throttled. They are answered at once."""

    def __init__(self, path: Path) -> None:
        """Listen for commands that name this configuration file. Raises OSError."""
        self._listener = _listen(_prefix(path, _THROTTLE))

    def fileno(self) -> int:
        return self._listener.fileno()

    def answer(self, throttled: Sequence[Throttled]) -> None:
        """Answer the commands of root or of this user that have arrived. Raises OSError if descriptors are short."""
        _answer([*_accept(self._listener)], msgspec.json.encode(throttled))


def _listen(prefix: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(f"\0{prefix}{os.getpid()}")
        listener.listen(_MAX_WAITING)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _accept(listener: socket.socket) -> Iterator[socket.socket]:
    """Yield the connections of root or of this user that have arrived. Raises OSError if descriptors are short."""
    with suppress(BlockingIOError, ConnectionError):  # none is left, or it has gone
        while True:
            connection, _ = listener.accept()
            if Peer.of(connection).uid in {0, os.geteuid()}:
                connection.setblocking(False)
                yield connection
            else:
                connection.close()


def _answer(connections: Sequence[socket.socket], answer: bytes) -> None:
    for connection in connections:
        with suppress(OSError), connection:
            connection.send(answer)


def ask_for_reload(path: Path) -> Mapping[int, Answer]:
    """Have each running server of a configuration file reload it. Return the answers by process ID.

    Raises StartError if there is none, if one cannot be asked, and if one ends before it answers.
    """
    if not AVAILABLE:
        raise StartError("`tokenauth reload` works on Linux only; run `kill -HUP PID` instead, and look at the log.")
    answers = _ask_all(path, _prefix(path))
    return {pid: msgspec.json.decode(data, type=Answer) for pid, data in answers.items()}


def ask_who_is_throttled(path: Path) -> Sequence[Throttled]:
    """Return whom the running servers of a configuration file have refused, and who may still have to wait.

    Raises StartError if there is no server, or if one does not answer.
    """
    if not AVAILABLE:
        raise StartError("The list of throttled logins works on Linux only; use GET /api/throttle instead.")
    answers = _ask_all(path, _prefix(path, _THROTTLE)).values()
    return [each for data in answers for each in msgspec.json.decode(data, type=list[Throttled])]


def _ask_all(path: Path, prefix: str) -> Mapping[int, bytes]:
    """Return the answers of the servers that listen under such names, by process ID. Raises StartError."""
    answers: dict[int, bytes] = {}
    names = [name for name in _names(prefix) if not _ask(name, path, answers)]
    deadline = time.monotonic() + _CONNECT_TIME
    while names and time.monotonic() < deadline:
        time.sleep(0.05)
        names = [name for name in names if not _ask(name, path, answers)]
    if not answers:
        busy = " One, of whatever user, takes no more connections." if names else ""
        raise StartError(f"No server of this user serves {path}: start one with `tokenauth serve`.{busy}")
    return answers


def _ask(name: str, path: Path, answers: dict[int, bytes]) -> bool:
    """Note the answer of a server under its process ID, if it is ours. Return False if its queue is full for now."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_TIME)
        try:
            connection.connect(f"\0{name}")
            peer = Peer.of(connection)
            if _is_ours(peer, path):
                answers[peer.pid] = _receive(connection, peer)
        except BlockingIOError:
            return False
        except ConnectionRefusedError:  # it has just ended
            pass
        except TimeoutError:
            raise StartError(f"The server has not answered within {_ANSWER_TIME:.0f} seconds.") from None
    return True


def _receive(connection: socket.socket, peer: Peer) -> bytes:
    data = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    if not data:
        raise StartError(f"The server with process {peer.pid} has ended, or does not take orders of this user.")
    return data


def _prefix(path: Path, purpose: str = "") -> str:
    """Return how the names of a configuration's sockets begin: links of the file itself are not followed.

    Raises ConfigError.
    """
    path = path.absolute()
    try:
        directory = path.parent.stat()
    except OSError as error:
        raise ConfigError(f"{path.parent}: {error.strerror}") from None
    digest = sha256(f"{directory.st_dev} {directory.st_ino} {path.name}".encode(errors="surrogateescape")).hexdigest()
    return f"tokenauth-{purpose}{digest[:32]}-"


def _names(prefix: str) -> Sequence[str]:
    """Return the names of listening sockets that begin with the prefix."""
    lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()
    found = [line.rpartition(" @")[2] for line in lines if f" @{prefix}" in line]
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
