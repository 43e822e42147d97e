"""What a server serves: its settings, and the content of the files that they name."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from tokenauth.errors import ConfigError
from tokenauth.logs import log
from tokenauth.passwords import Passwords
from tokenauth.risks import Risk, check_accepted, find_risks, log_and_check
from tokenauth.server import tls
from tokenauth.server.listener import check_address
from tokenauth.settings import loader
from tokenauth.settings.files_read import FilesRead
from tokenauth.settings.model import ServerSettings, Settings


class Configuration(NamedTuple):
    """The settings in use, and the content of the TLS files.

    restart_needed: what has changed in the file and is not in use before a restart, one sentence for each.
    """

    settings: Settings
    certificate: tls.KeyPair | None = None
    restart_needed: Sequence[str] = ()


class ConfigurationFile:
    """The configuration of `tokenauth serve`, with the options of its command line. A reload reads it again."""

    def __init__(self, path: Path, host: str | None, port: int | None, workers: int | None) -> None:
        """Prefer the arguments that are not None to the settings in the file."""
        self.path = path
        self._files = FilesRead()
        self._options = {"host": host, "port": port, "workers": workers}
        self._first: Settings
        self._served: Settings

    def read(self, quiet: bool = False) -> tuple[Configuration, Sequence[Risk]]:
        """Read the file for the first time, and log its risks; if `quiet`, only when one is refused.

        Raises ConfigError for settings that cannot be served.
        """
        self._first = loader.load(self.path, files=self._files)
        options = self._options
        if self._first.server.socket and options["host"] is not None and options["port"] is None:
            raise ConfigError(
                f"--host: {self.path} has server.socket, where no address is used; leave out --host, or add --port to"
                " open a port instead of the socket"
            )
        socket = None if options["port"] is None else ""
        self._served = loader.override(self._first, **options, socket=socket)
        with self._naming():
            check_address(self._served.server)
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
        needed = list(_changed_addresses(self._first.server, file.server, served.server))
        if file.metrics != served.metrics:
            needed.append("metrics.listen changes only at a restart")
            file = replace(file, metrics=served.metrics)
        if file.audit != served.audit:
            needed.append("[audit] changes only at a restart")
            file = replace(file, audit=served.audit)
        for detail in needed:
            log.warning("restart_needed", detail=f"{path}: {detail}")
        address = {"host": served.server.host, "port": served.server.port, "socket": served.server.socket}
        configuration, _ = self._checked(loader.override(file, workers=self._options["workers"], **address))
        return configuration._replace(restart_needed=needed)

    def changed(self) -> bool:
        """Return whether a file has changed since the last attempt to read it. To be called once a second."""
        return self._files.changed()

    def _checked(self, settings: Settings, quiet: bool = False) -> tuple[Configuration, Sequence[Risk]]:
        with self._naming():
            found = find_risks(settings, Passwords(settings.passwords, settings.users_by_name), self.path)
            risks = [Risk(risk.name, self._name_options(risk.text)) for risk in found]
            certificate = tls.read(settings.server, self._files)
            if quiet:
                with suppress(ConfigError):
                    check_accepted(settings, risks)
                    return Configuration(settings, certificate), risks
            log_and_check(settings, risks)
        return Configuration(settings, certificate), risks

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Let a ConfigError name the option of the command line that it is about, or else the file."""
        try:
            yield
        except ConfigError as error:
            text = self._name_options(str(error))
            raise ConfigError(text if text.startswith("--") else f"{self.path}: {text}") from None

    def _name_options(self, text: str) -> str:
        """Replace the keys of settings by the options that override them."""
        given = "|".join(name for name, value in self._options.items() if value is not None)
        return re.sub(rf"(?<![\w.'])server\.({given})(?=[ :])", r"--\1", text) if given else text


def _changed_addresses(first: ServerSettings, file: ServerSettings, served: ServerSettings) -> Iterator[str]:
    """Yield a sentence if settings of the listening socket have changed in the file."""
    names = [name for name in ("host", "port", "socket", "socket_mode") if getattr(file, name) != getattr(first, name)]
    if names:
        where = served.socket or f"{served.host} port {served.port or 'as before'}"
        verb = "changes" if len(names) == 1 else "change"
        yield f"{' and '.join(f'server.{name}' for name in names)} {verb} only at a restart; still serving on {where}"
