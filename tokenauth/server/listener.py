"""The listening socket, which all workers share."""

import ctypes
import errno
import os
import socket
import struct
import sys
from contextlib import suppress

from tokenauth.errors import ConfigError, StartError
from tokenauth.server import unix_socket
from tokenauth.settings.model import ServerSettings


def listen(settings: ServerSettings) -> socket.socket:
    """Listen from now on, so that clients that connect while the workers start wait. Raises StartError.

    To be called after `check_address`.
    """
    if settings.socket:
        return unix_socket.UnixListener(settings.socket, int(settings.socket_mode, 8))
    try:
        return socket.create_server((settings.host, settings.port), family=_family(settings.host), backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(f"Port {settings.port} is in use: stop the other server or pass --port.") from None
        reason = os.strerror(error.errno or 0)
        raise StartError(f"server.port: cannot listen on {settings.port}: {reason}; use another port") from None


def check_address(settings: ServerSettings) -> None:
    """Raise ConfigError if no server of this user can listen on the address. Whether it is free is not asked."""
    if settings.socket:
        unix_socket.check(settings.socket)
        return
    try:
        _bind(settings.host, 0)
    except OSError as error:
        problem = f"cannot be resolved: {error.strerror}"
        if not isinstance(error, socket.gaierror):
            problem = f"cannot be listened on: {error.strerror}"
        advice = "write an address of this machine, such as '127.0.0.1' or '0.0.0.0' (all of IPv4)"
        raise ConfigError(f"server.host: {settings.host!r} {problem}; {advice}") from None
    try:
        _bind(settings.host, settings.port)
    except PermissionError as error:
        problem = f"cannot be listened on by this user: {error.strerror}"
        raise ConfigError(f"server.port: {settings.port} {problem}; use a port from 1024 to 65535") from None
    except OSError:
        pass  # a server has it


def _bind(host: str, port: int) -> None:
    """Reserve an address, as `listen` does, and give it back."""
    family = _family(host)
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind((host, port))


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def stop_handshakes(listener: socket.socket) -> None:
    """Drop new connection attempts. Connections in the queue can still be accepted, here and in other processes.

    Otherwise a connection could enter the queue after the last look at it, and be reset when the socket is closed.
    Linux drops the first packet (SYN) of a new connection, and the client sends it again after a second. By then the
    socket is closed and refuses the connection, or another server has the port. Other systems have no such filter:
    there, a client that connects at the very end can be reset. A Unix socket needs none: its file is removed.
    """
    if isinstance(listener, unix_socket.UnixListener):
        listener.remove_file()
        return
    if sys.platform != "linux":
        return
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _DROP_SYN)
    memory = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(memory))
    with suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


_SO_ATTACH_FILTER = 26

_DROP_SYN = (
    (0x30, 0, 0, 13),  # load the byte of the TCP header that has the flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # only SYN?
    (0x06, 0, 0, 0),  # then drop the packet
    (0x06, 0, 0, 0xFFFF),  # else let it pass
)
"""A program of the classic Berkeley Packet Filter."""
