"""The channel between the main process and a worker, and the messages that they send each other."""

import pickle
import selectors
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from tokenauth.metrics import Snapshot
from tokenauth.models import ServedDatabase, User
from tokenauth.revocation_queue import RevocationUpdate
from tokenauth.server.tls import KeyPair
from tokenauth.settings.model import Settings
from tokenauth.status import NodeStatus

_LENGTH = struct.Struct("!I")
_READ = 16 * 1024


GRACE = 30
"""Seconds that a worker that stops has to answer the requests that it has accepted."""

HEARTBEAT = 1.0
"""Seconds between two reports of a worker."""


class Serve(NamedTuple):
    """The first message to a worker: serve these settings, which were read from `path`."""

    path: Path
    settings: Settings
    held: RevocationUpdate
    database: ServedDatabase | None = None
    """The database that earlier workers serve. The first ones may create it."""
    counts_store: bool = False
    """Whether this worker counts for metrics what is the same for all: live tokens and leases."""
    certificate: KeyPair | None = None


class ChangeUsers(NamedTuple):
    """A message to a worker that will be replaced: until then, use the users of the new configuration."""

    removed: Sequence[str]
    changed: Mapping[str, User]


class Stop(NamedTuple):
    """The last message to a worker: accept no more connections, answer what was accepted, and end."""

    replaced: bool
    """Whether other workers take over the revocations that this one holds."""


class Applied(NamedTuple):
    """A message to a worker: all others have applied its update of this number."""

    number: int


class Alone(NamedTuple):
    """A message to a worker: whether it is the only one."""

    alone: bool


class NodeAnswer(NamedTuple):
    """A message to a worker that has asked how the node is doing."""

    status: NodeStatus


Order = Serve | ChangeUsers | RevocationUpdate | Applied | Alone | NodeAnswer | Stop
"""A message from the main process to a worker."""


class Report(msgspec.Struct, omit_defaults=True):
    """A message from a worker to the main process."""

    state: Literal["alive", "ready", "failed"]
    reason: str = ""
    configuration: bool = False
    """Whether an error in the configuration is the reason."""
    revocations: RevocationUpdate | None = None
    database: str | None = None
    """The identity of the database that this worker serves."""
    metrics: Snapshot | None = None
    """What this worker has counted since its start."""
    asks: bool = False
    """Whether this worker asks how the node is doing."""
    drained: bool = False
    """Whether this worker takes no more requests: it only answers those that it has."""
    acts: Sequence[bytes] = ()
    """Records for the audit log that this worker could not write before its end."""
    applied: int = 0
    """The number of an update that this worker has applied; 0 if there is none."""


def encode_order(order: Order) -> bytes:
    """Encode an order. Pickle is safe here: only the main process and its worker hold the ends of the channel."""
    return pickle.dumps(order)


def decode_order(encoded: bytes) -> Order:
    order: Order = pickle.loads(encoded)  # noqa: S301  (see encode_order)
    return order


def encode_report(report: Report) -> bytes:
    return msgspec.msgpack.encode(report)


def decode_report(encoded: bytes) -> Report:
    """Decode what `encode_report` returned. The main process accepts no pickle from a worker, which reads requests."""
    return msgspec.msgpack.decode(encoded, type=Report)


class Channel:
    """One end of the channel. It carries whole messages in both directions, and no call but `wait` blocks.

    The channel closes when the process at the other end ends, for whatever reason. This is how a worker notices that
    the main process is gone, on every system and also while it starts.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._in = bytearray()
        self._out = bytearray()

    def fileno(self) -> int:
        return self._end.fileno()

    @property
    def pending(self) -> bool:
        """Whether data waits to be sent: call `flush` when the channel is writable."""
        return bool(self._out)

    def send(self, message: bytes) -> None:
        """Send a message, now or at a later `flush`."""
        self._out += _LENGTH.pack(len(message)) + message
        self.flush()

    def flush(self) -> None:
        """Send as much pending data as the socket accepts now."""
        with suppress(BlockingIOError):
            try:
                while self._out:
                    del self._out[: self._end.send(self._out)]
            except ConnectionError:  # the other process is gone, which `receive` reports
                self._out.clear()

    def receive(self) -> list[bytes]:
        """Return the messages that have arrived. Raises EOFError when the other side is gone."""
        messages: list[bytes] = []
        try:
            while data := self._end.recv(_READ):
                self._in += data
        except BlockingIOError:
            closed = False
        except ConnectionError:
            closed = True
        else:
            closed = True
        while len(self._in) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._in)
            end = _LENGTH.size + length
            if len(self._in) < end:
                break
            messages.append(bytes(self._in[_LENGTH.size : end]))
            del self._in[:end]
        if closed and not messages:
            raise EOFError
        return messages

    def wait(self) -> list[bytes]:
        """Wait for messages. Raises EOFError when the other side is gone."""
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            while True:
                selector.select()
                messages = self.receive()
                if messages:
                    return messages

    def close(self) -> None:
        self._end.close()
