"""Web pages of other origins, with the script of README.md."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Frame

from tests.support.servers import ROOT

_FRAMED = '<!doctype html><title>framed</title><iframe sandbox="allow-scripts" src="/"></iframe>'

_ASK = """async ([path, init]) => {
  try {
    const answer = await fetch(path.startsWith("http") ? path : API + path, init);
    return { status: answer.status, headers: Object.fromEntries(answer.headers), body: await answer.text() };
  } catch (error) {
    return `${error.name}: ${error.message}`;
  }
}"""

REFUSED = "TypeError: Failed to fetch"
"""The only error that a page gets if its browser withholds the answer."""


def shown(language: str) -> str:
    """Return the README's code block for web pages in this language."""
    section = (ROOT / "README.md").read_text().partition("\n## Login from a web page\n")[2].partition("\n## ")[0]
    (code,) = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return str(code)


def put(code: str, old: str, new: str) -> str:
    """Replace a placeholder, which must occur once."""
    assert code.count(old) == 1, f"README.md: {old!r} must occur once:\n{code}"
    return code.replace(old, new)


def script(api: str) -> str:
    """Return the script for a service at this URL."""
    return put(shown("js"), "https://auth.example.com", api)


def document(api: str) -> str:
    """Return a page with the script."""
    return f"<!doctype html><title>page</title><script>\n{script(api)}</script>"


def ask(frame: Frame, path: str, **init: Any) -> Any:
    """Fetch from a page. Return status, headers and body as the page sees them, or its error."""
    return frame.evaluate(_ASK, [path, init])


class Site(ThreadingHTTPServer):
    """A web server for 127.0.0.1 and localhost, with a page that calls the service at `api`.

    `/framed` shows the page in a sandbox. `/open` can be read from any origin. `/behind` has the page for the service
    behind this site, which is also a reverse proxy.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.api = ""
        self.page = ""

    def call(self, api: str) -> None:
        """Set the URL of the service that the page calls."""
        self.api = api
        self.page = document(api)

    def origin(self, host: str) -> str:
        """Return the origin of the pages on this host."""
        return f"http://{host}:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site = self.server
        pages = {"/": site.page, "/framed": _FRAMED, "/open": "open"}
        pages["/behind"] = document(f"http://{self.headers['Host']}")
        if self.path.startswith("/api/"):
            self._pass_on()
        elif self.path in pages:
            headers = {"Content-Type": "text/html"}
            if self.path == "/open":
                headers["Access-Control-Allow-Origin"] = "*"
            self._answer(200, headers, pages[self.path].encode())
        else:
            self._answer(404, {}, b"")

    def do_POST(self) -> None:
        self._pass_on()

    def do_DELETE(self) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        connection = HTTPConnection(urlsplit(self.server.api).netloc, timeout=30)
        try:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            connection.request(self.command, self.path, sent, dict(self.headers))
            answer = connection.getresponse()
            self._answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in ({**headers, "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running(site: Site) -> Iterator[Site]:
    thread = threading.Thread(target=site.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield site
    finally:
        site.shutdown()
        thread.join()
        site.server_close()
