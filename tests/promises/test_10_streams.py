"""Promise 10: a stop or a reload ends the streams of /api/events at once, and says so."""

import signal
import time
from pathlib import Path

import pytest

from tests.support.servers import log_in, serve, write_config
from tests.support.streaming import EventStream

ATTEMPTS = range(5)
"""Of these one must be quick: the machine may be busy. A stream that delays a stop always does."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["stop", "reload"])
def test_a_stop_or_a_reload_ends_streams_at_once(tmp_path: Path, number: signal.Signals) -> None:
    assert any(seconds_to_end(tmp_path / str(attempt), number) < 5 for attempt in ATTEMPTS), "streams delay it"


def seconds_to_end(directory: Path, number: signal.Signals) -> float:
    """Return how long a stop takes, or the end of the former workers' streams."""
    directory.mkdir()
    with serve(write_config(directory), "--workers", "2") as server, server.client() as client:
        token = log_in(client)
        streams = [EventStream(server.port, token) for _ in range(20)]
        for stream in streams:
            assert stream.next().name == "hello"
        stalled = EventStream(server.port, token, read=False, buffer=1)
        server.process.send_signal(number)
        if number == signal.SIGHUP:
            server.wait("reloaded")
        began = time.monotonic()
        for stream in streams:
            assert stream.wait("bye").data == {"reason": "stop"}
            stream.wait_end()
            stream.close()
        if number == signal.SIGTERM:
            assert server.process.wait(60) == 0
        else:
            with EventStream(server.port, token) as again:
                assert again.next().name == "hello"
        stalled.close()
        seconds = time.monotonic() - began
        assert server.errors() == []
    return seconds
