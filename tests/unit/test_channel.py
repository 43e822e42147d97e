"""The channel between the main process and a worker, and how signals reach the main process."""

import os
import signal
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenauth.server.channel import Channel
from tokenauth.server.supervisor import Interrupted, Signals


@settings(max_examples=50)
@given(messages=st.lists(st.sampled_from([0, 1, 7, 65_536, 1_000_000]).map(lambda size: b"x" * size), max_size=6))
def test_messages_of_any_size_arrive_whole_and_in_order(messages: list[bytes]) -> None:
    here, there = map(Channel, socket.socketpair())
    arrived: list[bytes] = []
    for message in messages:
        here.send(message)  # it does not block, although nothing reads
    while len(arrived) < len(messages):
        arrived += there.receive()
        here.flush()
    assert arrived == messages
    assert not here.pending
    here.close()
    with pytest.raises(EOFError):
        there.receive()
    there.send(b"to a closed channel")
    there.close()


def test_what_was_sent_before_the_end_arrives() -> None:
    here, there = map(Channel, socket.socketpair())
    here.send(b"last")
    here.close()
    assert there.receive() == [b"last"]
    with pytest.raises(EOFError):
        there.wait()
    there.close()


def test_an_incomplete_message_is_not_delivered() -> None:
    end, other = socket.socketpair()
    channel = Channel(end)
    other.sendall(b"\0\0\0\4ab")
    assert channel.receive() == []
    other.sendall(b"cd\0\0")
    assert channel.receive() == [b"abcd"]
    other.close()
    with pytest.raises(EOFError):
        channel.receive()
    channel.close()


@pytest.fixture
def signals() -> Iterator[Signals]:
    """Catch SIGUSR1 and SIGUSR2."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    signals = Signals()
    signals.catch(*numbers)
    yield signals
    signal.set_wakeup_fd(-1)
    signals._receiver.close()  # a main process keeps them until it ends
    signals._sender.close()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_signals_are_taken_once_and_in_order(signals: Signals) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert signals.take() == [signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1]
    assert signals.take() == []


def send_both_signals(signals: Signals) -> None:
    """Send two signals, one of which interrupts."""
    with signals.interrupting(signal.SIGUSR1):
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError("not interrupted")


def test_a_signal_interrupts_a_slow_step_and_is_kept(signals: Signals) -> None:
    with pytest.raises(Interrupted):
        send_both_signals(signals)
    assert signals.take() == [signal.SIGUSR2, signal.SIGUSR1]
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.take() == [signal.SIGUSR1]
