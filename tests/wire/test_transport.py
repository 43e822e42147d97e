"""Transports that send the writes of one turn together, in order, and close without losing any."""

import asyncio
from typing import Any, cast

from tokenauth.server.transport import LingeringTransport


class Line(asyncio.Transport):
    """A transport that keeps what is sent, and when it was closed."""

    def __init__(self) -> None:
        super().__init__({"peername": ("10.0.0.1", 5)})
        self.sent: list[bytes | str] = []

    def write(self, data: Any) -> None:
        """Keep data."""
        self.sent.append(bytes(data))

    def close(self) -> None:
        """Keep that it was closed."""
        self.sent.append("closed")

    def can_write_eof(self) -> bool:
        """Return True."""
        return True

    def write_eof(self) -> None:
        """Keep that this side was ended."""
        self.sent.append("ended")

    def resume_reading(self) -> None:
        """Go on reading, as it does anyway."""

    def get_write_buffer_size(self) -> int:
        """Return 0: all is sent at once."""
        return 0

    def is_closing(self) -> bool:
        """Whether it was closed."""
        return "closed" in self.sent


async def turn() -> None:
    """Let the event loop go round."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_writes_of_one_loop_turn_are_sent_together() -> None:
    line = Line()
    transport = LingeringTransport(line, asyncio.get_running_loop())
    transport.write(b"head ")
    transport.write(b"body")
    assert line.sent == []
    await turn()
    assert line.sent == [b"head body"]
    transport.write(b"more")
    await turn()
    assert line.sent == [b"head body", b"more"]


async def test_buffered_data_is_sent_before_the_close() -> None:
    line = Line()
    transport = LingeringTransport(line, asyncio.get_running_loop())
    transport.write(b"last")
    assert not transport.is_closing()
    transport.close()
    assert transport.is_closing()
    await turn()
    assert line.sent == [b"last", "closed"]


async def test_while_a_client_may_send_only_the_write_side_closes() -> None:
    """The transport counts as closed all the same, and takes nothing more."""
    line = Line()
    transport = LingeringTransport(line, asyncio.get_running_loop())
    transport.lingers = True
    transport.write(b"last")
    transport.close()
    transport.close()
    assert transport.is_closing()
    transport.write(b"more")
    await turn()
    assert line.sent == [b"last", "ended"]


async def test_no_more_is_held_back_than_64_kib() -> None:
    line = Line()
    transport = LingeringTransport(line, asyncio.get_running_loop())
    parts = [bytes([number]) * 30_000 for number in range(5)]
    for part in parts:
        transport.write(part)
    assert line.sent == [b"".join(parts[:3])]
    await turn()
    assert line.sent == [b"".join(parts[:3]), b"".join(parts[3:])]


async def test_everything_else_is_left_to_the_transport() -> None:
    transport = LingeringTransport(Line(), asyncio.get_running_loop())
    assert transport.get_extra_info("peername") == ("10.0.0.1", 5)
    assert isinstance(cast(Any, transport).sent, list)
