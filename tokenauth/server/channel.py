"""The channel between the main process and one worker: whole messages over a socket, in both directions."""

import selectors
import socket
import struct
from contextlib import suppress

_LENGTH = struct.Struct("!I")
_READ = 16 * 1024


class Channel:
    """One end of the channel. Neither sending nor receiving ever waits for the other side.

    The channel closes with the process at the other end, however that process ends. A worker notices in this way that
    the main process is gone, on every system and at every moment of its life.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._in = bytearray()
        self._out = bytearray()

    def fileno(self) -> int:
        """Return the descriptor, for selectors and event loops."""
        return self._end.fileno()

    @property
    def pending(self) -> bool:
        """Whether something still has to be sent: call `flush` when the channel is writable."""
        return bool(self._out)

    def send(self, message: bytes) -> None:
        """Send a message, now or at a later `flush`."""
        self._out += _LENGTH.pack(len(message)) + message
        self.flush()

    def flush(self) -> None:
        """Send what is pending, as far as the other side has room for it."""
        with suppress(BlockingIOError):
            try:
                while self._out:
                    del self._out[: self._end.send(self._out)]
            except ConnectionError:  # the other process is gone, which `receive` will say
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
        """Close this end."""
        self._end.close()
