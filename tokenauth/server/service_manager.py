"""Tells systemd how the service is: the protocol of sd_notify(3), for units of Type=notify."""

import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress


class ServiceManager:
    """The process that started the service and wants to know its state. Without one, all of this does nothing.

    A message that cannot be delivered is dropped: the service does not depend on it.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Take the address out of the environment, so that no child process speaks for the service."""
        address = environment.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        pid = environment.pop("WATCHDOG_PID", "")
        wanted = environment.pop("WATCHDOG_USEC", "") != "" and pid in {"", str(os.getpid())}
        self._watched = wanted and self._address != ""

    def ready(self) -> None:
        """Say that the service serves, for the first time or after a reload that was accepted or refused."""
        self._send("READY=1")

    def reloading(self) -> None:
        # systemd compares this with the time of its own request (sd_notify(3), RELOADING=1)
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Say that the main process works. It watches the workers itself."""
        if self._watched:
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(message.encode(), self._address)
