"""`tokenauth health`: asks a running server how it is, for a container or a process manager.

It runs every few seconds: it loads no more than it needs.
"""

import http.client
import json
import math
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from tokenauth.cli.base import config_option
from tokenauth.errors import ConfigError
from tokenauth.logs import printable

if TYPE_CHECKING:
    from tokenauth.settings.model import ServerSettings

_MAX_ANSWER = 1 << 16

_ANSWER_TIME = 5.0

Connect = Callable[[float], http.client.HTTPConnection]


@click.command(epilog="Example: tokenauth health --ready")
@config_option
@click.option("--url", metavar="URL", help="Address of the server, instead of that in the configuration.")
@click.option("--ready", is_flag=True, help="Ask whether it can serve, and not only whether it answers.")
@click.option("--timeout", metavar="SECONDS", type=click.FloatRange(0.1, 60), default=5.0, show_default=True)
def health(config_file: str | None, url: str | None, ready: bool, timeout: float) -> None:
    """Check that the running server answers. Exit with 1 if it does not.

    It asks GET /healthz, or with --ready GET /readyz, at the address in the configuration. If the server was started
    with --host or --port, name its address with --url. A mistake that the file has by now is no failure: the server
    goes on with what it has read.
    """
    if math.isnan(timeout):
        raise click.UsageError("--timeout: must be a number of seconds.")
    path = settings = None
    if url is not None:
        where, connect = _of_url(url)
    else:
        from tokenauth.settings import loader

        path = loader.find(config_file)
        try:
            settings = loader.load(path).server
        except ConfigError as error:
            where, connect = _of_server(path, error, timeout)
            click.echo(printable(f"Warning: {error}. The server goes on with what it has read before."), err=True)
        else:
            unknown = ConfigError(f"{path}: server.port is 0: name the address of the server with --url.")
            anywhere = not settings.socket and settings.port == 0
            where, connect = _of_server(path, unknown, timeout) if anywhere else _of_settings(settings)
    target, expected = ("/readyz", "ready") if ready else ("/healthz", "ok")
    deadline = time.monotonic() + timeout
    try:
        status, body = _get(connect(timeout), target)
    except (OSError, http.client.HTTPException) as error:
        left = 0.0 if isinstance(error, TimeoutError) else deadline - time.monotonic()
        answer = None if settings is None or left <= 0 else _get_before_reload(settings, target, left)
        if settings is None or answer is None:
            elsewhere = "" if path is None or not isinstance(error, OSError) else _elsewhere(path)
            raise click.ClickException(printable(f"{where}: {_reason(error)}{elsewhere}")) from None
        click.echo(f"Warning: {where} {still_speaks(settings)}; {RELOAD}.", err=True)
        status, body = answer
    found = _read(body)
    if status != http.HTTPStatus.OK or found.get("status") != expected:
        reason = found.get("reason", f"the answer has status {status}, and is not that of tokenauth")
        raise click.ClickException(printable(f"{where}: {reason}"))
    click.echo(expected)


ADDRESS_STAYS = "server.host, port and socket change only at a restart"


def _elsewhere(path: Path) -> str:
    """Return what to add if nothing answers at the address, but a server of this configuration runs."""
    from tokenauth.server.control import find_servers

    servers = find_servers(path)
    return f". Process {servers[0]} serves {path} elsewhere: {ADDRESS_STAYS}." if servers else ""


def _reason(error: OSError | http.client.HTTPException) -> str:
    if isinstance(error, TimeoutError):
        return "did not answer in time"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "the answer is not HTTP"


def _get(connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes]:
    with closing(connection):
        connection.request("GET", path, headers={"Connection": "close"})
        answer = connection.getresponse()
        return answer.status, answer.read(_MAX_ANSWER)


def _read(body: bytes) -> Mapping[str, str]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return {name: str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _of_url(url: str) -> tuple[str, Connect]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    else:
        if parts.scheme not in {"http", "https"} or parts.username is not None or parts.path not in {"", "/"}:
            host = None
    if not host:
        raise click.UsageError("--url: must be an address such as 'http://127.0.0.1:8000'.")
    return _tcp(host, port or (443 if parts.scheme == "https" else 80), parts.scheme == "https")


def ask(server: "ServerSettings", path: str) -> Mapping[str, str]:
    """Return the JSON object that the server of these settings answers; an empty one if it does not."""
    _, connect = _of_settings(server)
    try:
        _, body = _get(connect(_ANSWER_TIME), path)
    except (OSError, http.client.HTTPException):
        return {}
    return _read(body)


RELOAD = "the file has changed since then: run `tokenauth reload`"


def still_speaks(server: "ServerSettings") -> str:
    """Return how a server answers that has not read a change of `tls_certificate` yet."""
    return f"still speaks {'http, not https' if server.tls_certificate else 'https, not http'}"


def ask_before_reload(server: "ServerSettings", path: str) -> Mapping[str, str]:
    """Return what a server answers that has not read a change of `tls_certificate` yet; otherwise an empty object."""
    answer = _get_before_reload(server, path, _ANSWER_TIME)
    return {} if answer is None else _read(answer[1])


def _get_before_reload(server: "ServerSettings", path: str, timeout: float) -> tuple[int, bytes] | None:
    if server.socket:
        return None
    _, connect = _tcp(server.reachable_host, server.port, not server.tls_certificate)
    try:
        return _get(connect(timeout), path)
    except (OSError, http.client.HTTPException):
        return None


def _of_settings(server: "ServerSettings") -> tuple[str, Connect]:
    if server.socket:
        return server.socket, lambda timeout: _UnixConnection(server.socket, timeout)
    return _tcp(server.reachable_host, server.port, bool(server.tls_certificate))


def _of_server(path: Path, mistake: ConfigError, seconds: float) -> tuple[str, Connect]:
    """Return where the running server of a file listens. Raises the mistake if there is none."""
    from tokenauth.server.control import find_address

    found = find_address(path, seconds)
    if found is None:
        raise mistake
    if found.socket:
        return found.socket, lambda timeout: _UnixConnection(found.socket, timeout)
    return _tcp(found.host, found.port, found.tls)


def _tcp(host: str, port: int, tls: bool) -> tuple[str, Connect]:
    where = f"{f'[{host}]' if ':' in host else host}:{port}"
    if not tls:
        return where, lambda timeout: http.client.HTTPConnection(host, port, timeout=timeout)
    # The certificate is for the public name. Nothing secret is sent, and "ok" of a stranger opens no door.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return where, lambda timeout: http.client.HTTPSConnection(host, port, timeout=timeout, context=context)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = os.path.abspath(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
