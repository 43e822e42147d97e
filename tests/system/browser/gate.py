"""A reverse proxy with TLS: the login page at one host, and applications behind `/auth?cookie` at others."""

import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

DOMAIN = "example.test"
"""Chromium finds all hosts of this domain on this machine."""

VISITOR = "192.0.2.7"
"""The address of everyone who comes through the proxy."""

_ASKED_WITH = ("cookie", "x-token", "authorization", "accept", "origin", "sec-fetch-site", "sec-fetch-mode")

_PAGE = """<!doctype html><title>{host}</title><h1>Private page of {user}</h1>
<p id="address">{path}</p>
<form method="post" action="/posted"><input name="x" value="y"><button>Send</button></form>
<p><a href="{auth}/logout">Log out</a></p>"""


def make_certificate(directory: Path, domain: str = DOMAIN) -> Path:
    """Create a certificate for all hosts of a domain and for localhost, and its key, in one file."""
    file = directory / "certificate.pem"
    names = f"subjectAltName=DNS:{domain},DNS:*.{domain},DNS:localhost"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={domain}", "-addext", names, "-keyout", str(file), "-out", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    file.write_text(file.read_text() + done.stdout)
    return file


class Gate(ThreadingHTTPServer):
    """The proxy. Without a certificate it speaks plain HTTP, for hosts of this machine.

    `auth` is the host of the login page; every other host is an application. `served` lists what reached one.
    """

    daemon_threads = True

    def __init__(self, auth: str, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.auth = auth
        self.backend = ""
        self.question = "/auth?cookie&login=redirect"
        self.hidden_from: set[str] = set()
        self.served: list[str] = []
        self.scheme = "http" if certificate is None else "https"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def origin(self, host: str) -> str:
        return f"{self.scheme}://{host}:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Be silent: browsers end connections as they like."""


class _Handler(BaseHTTPRequestHandler):
    server: Gate
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        gate = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        sent = {name.lower(): value for name, value in self.headers.items()}
        host = sent.get("host", "")
        named = {"x-forwarded-for": VISITOR, "x-forwarded-proto": gate.scheme, "x-forwarded-host": host}
        if host == urlsplit(gate.origin(gate.auth)).netloc and not self.path.startswith("/app"):
            self._pass_on(self.path, {**sent, **named}, body)
            return
        asked = {name: sent[name] for name in _ASKED_WITH if name in sent}
        if host.partition(":")[0] in gate.hidden_from:
            asked.pop("cookie", None)  # as if the browser did not send it
        asked |= {**named, "x-forwarded-method": self.command, "x-forwarded-uri": self.path}
        status, headers, answered = self._ask(gate.question, asked)
        if status != 200:
            self._answer(status, headers, answered)
            return
        if self.path != "/favicon.ico":
            gate.served.append(f"{self.command} {self.path}")
        page = _PAGE.format(
            host=host, user=escape(dict(headers)["x-auth-user"]), path=escape(self.path), auth=gate.origin(gate.auth)
        )
        self._answer(200, [("Content-Type", "text/html"), ("Cache-Control", "no-store")], page.encode())

    do_POST = do_GET  # noqa: N815 - the name is http.server's

    def _pass_on(self, path: str, headers: Mapping[str, str], body: bytes) -> None:
        status, answered, content = self._ask(path, headers, self.command, body)
        self._answer(status, answered, content)

    def _ask(
        self, path: str, headers: Mapping[str, str], method: str = "GET", body: bytes = b""
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = HTTPConnection(urlsplit(self.server.backend).netloc, timeout=30)
        try:
            connection.request(method, path, body, {**headers, "content-length": str(len(body))})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {"content-length", "connection", "transfer-encoding"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running(gate: Gate) -> Iterator[Gate]:
    thread = threading.Thread(target=gate.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield gate
    finally:
        gate.shutdown()
        thread.join()
        gate.server_close()
