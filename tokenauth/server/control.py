"""How `tokenauth reload` finds the servers of a configuration, asks them to reload, and gets their answer.

Each main process listens on a Unix socket without a file (Linux's abstract namespace). Its name is made of the
directory and the name of the configuration file, and of the process. So nothing is left behind by a killed server, and
the database may be anywhere. Both sides ask the kernel which user is at the other end.
"""

import os
import pwd
import socket
import stat
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import msgspec

from tokenauth.errors import ConfigError, StartError

AVAILABLE = sys.platform == "linux"

_ANSWER_TIME = 150.0
"""Seconds to wait for an answer. A reload takes at most a minute, and waits for one that is under way."""

_CONNECT_TIME = 3.0
"""Seconds in which a server must take a connection: a program of another user can listen under its name."""

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
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(f"\0{_prefix(path)}{os.getpid()}")
            self._listener.listen(_MAX_WAITING)
            self._listener.setblocking(False)
        except BaseException:
            self._listener.close()
            raise

    def fileno(self) -> int:
        return self._listener.fileno()

    def take(self) -> bool:
        """Accept the commands that have arrived; return whether there were any of root or of this user.

        Each of them then gets the answer of the next attempt: call `started` if that lasts, or else `refuse`. Raises
        OSError if descriptors are short.
        """
        with suppress(BlockingIOError, ConnectionError):  # none is left, or it has gone
            while True:
                connection, _ = self._listener.accept()
                if Peer.of(connection).uid in {0, os.geteuid()} and len(self._asking) < _MAX_WAITING:
                    connection.setblocking(False)
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
        _answer(asking, answer)

    def end(self, answer: Answer) -> None:
        """Answer those who wait for the end of the reload."""
        waiting, self._waiting = self._waiting, []
        _answer(waiting, answer)

    def stop(self) -> None:
        """Close the connections of all that wait: they get no answer."""
        for connection in (*self._asking, *self._waiting):
            connection.close()
        self._asking, self._waiting = [], []


def _answer(connections: Sequence[socket.socket], answer: Answer) -> None:
    for connection in connections:
        with suppress(OSError), connection:
            connection.send(msgspec.json.encode(answer))


def ask_for_reload(path: Path) -> Mapping[int, Answer]:
    """Have each running server of a configuration file reload it. Return the answers by process ID.

    Raises StartError if there is none, if one cannot be asked, and if one ends before it answers.
    """
    if not AVAILABLE:
        raise StartError("`tokenauth reload` works on Linux only; run `kill -HUP PID` instead, and look at the log.")
    answers: dict[int, Answer] = {}
    names = [name for name in _names(_prefix(path)) if not _ask(name, path, answers)]
    deadline = time.monotonic() + _CONNECT_TIME
    while names and time.monotonic() < deadline:
        time.sleep(0.05)
        names = [name for name in names if not _ask(name, path, answers)]
    if not answers:
        busy = " One, of whatever user, takes no more connections." if names else ""
        raise StartError(f"No server of this user serves {path}: start one with `tokenauth serve`.{busy}")
    return answers


def _ask(name: str, path: Path, answers: dict[int, Answer]) -> bool:
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


def _receive(connection: socket.socket, peer: Peer) -> Answer:
    data = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    if not data:
        raise StartError(f"The server with process {peer.pid} has ended, or does not take orders of this user.")
    return msgspec.json.decode(data, type=Answer)


def _prefix(path: Path) -> str:
    """Return how the names of a configuration's sockets begin: links of the file itself are not followed.

    Raises ConfigError.
    """
    path = path.absolute()
    try:
        directory = path.parent.stat()
    except OSError as error:
        raise ConfigError(f"{path.parent}: {error.strerror}") from None
    digest = sha256(f"{directory.st_dev} {directory.st_ino} {path.name}".encode(errors="surrogateescape")).hexdigest()
    return f"tokenauth-{digest[:32]}-"


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
