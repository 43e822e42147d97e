"""What a server serves: its settings, and the content of the files that they name."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from tokenauth.errors import ConfigError
from tokenauth.logs import log
from tokenauth.passwords import Passwords
from tokenauth.risks import Risk, check_accepted, find_risks, log_and_check
from tokenauth.server import tls
from tokenauth.settings import loader
from tokenauth.settings.files_read import FilesRead
from tokenauth.settings.model import Settings


class Configuration(NamedTuple):
    """The settings in use, and the content of the TLS files."""

    settings: Settings
    certificate: tls.KeyPair | None = None


class ConfigurationFile:
    """The configuration of `tokenauth serve`, with the options of its command line. A reload reads it again."""

    def __init__(self, path: Path, host: str | None, port: int | None, workers: int | None) -> None:
        """Prefer the arguments that are not None to the settings in the file."""
        self.path = path
        self._files = FilesRead()
        self._host = host
        self._port = port
        self._workers = workers
        self._first: Settings
        self._served: Settings

    def read(self, quiet: bool = False) -> tuple[Configuration, Sequence[Risk]]:
        """Read the file for the first time, and log its risks; if `quiet`, only when one is refused.

        Raises ConfigError for settings that cannot be served.
        """
        self._first = loader.load(self.path, files=self._files)
        if self._first.server.socket and self._host is not None and self._port is None:
            raise ConfigError(
                f"--host: {self.path} has server.socket, where no address is used; leave out --host, or add --port to"
                " open a port instead of the socket"
            )
        socket = None if self._port is None else ""
        self._served = loader.override(
            self._first, host=self._host, port=self._port, socket=socket, workers=self._workers
        )
        return self._checked(self._served, quiet)

    def read_again(self) -> Configuration:
        """Read the file for a reload; the address stays. Raises ConfigError."""
        path, served = self.path, self._served
        self._files = FilesRead()
        if path.exists() and not path.is_file():
            raise ConfigError(
                f"{path}: is not a regular file, so it cannot be reloaded: restart to change the settings"
            )
        file = loader.load(path, files=self._files)
        if _address(file) != _address(self._first):
            log.warning("restart_needed", detail=f"{path}: server.host, port and socket change only at a restart")
        if file.metrics != served.metrics:
            log.warning("restart_needed", detail=f"{path}: metrics.listen changes only at a restart")
            file = replace(file, metrics=served.metrics)
        if file.audit != served.audit:
            log.warning("restart_needed", detail=f"{path}: [audit] changes only at a restart")
            file = replace(file, audit=served.audit)
        address = {"host": served.server.host, "port": served.server.port, "socket": served.server.socket}
        return self._checked(loader.override(file, workers=self._workers, **address))[0]

    def changed(self) -> bool:
        """Return whether a file has changed since the last attempt to read it. To be called once a second."""
        return self._files.changed()

    def _checked(self, settings: Settings, quiet: bool = False) -> tuple[Configuration, Sequence[Risk]]:
        with loader.naming(self.path):
            risks = find_risks(settings, Passwords(settings.passwords, settings.users_by_name), self.path)
            certificate = tls.read(settings.server, self._files)
            if quiet:
                with suppress(ConfigError):
                    check_accepted(settings, risks)
                    return Configuration(settings, certificate), risks
            log_and_check(settings, risks)
        return Configuration(settings, certificate), risks


def _address(settings: Settings) -> tuple[object, ...]:
    """Return the settings of the listening socket."""
    server = settings.server
    return server.host, server.port, server.socket, server.socket_mode
