"""/openapi.json describes the HTTP, and /docs shows it with Swagger UI, from files that are shipped in `pages/`."""

from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from importlib.resources import files

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth.errors import NotFound
from tokenauth.web.openapi import Document, describe
from tokenauth.web.operations import Answer, operation
from tokenauth.web.responses import JSON, answer
from tokenauth.web.routing import Handlers, Route

_FILES = {
    "index.html": b"text/html; charset=utf-8",
    "start.js": b"text/javascript; charset=utf-8",
    "swagger-ui-bundle.js": b"text/javascript; charset=utf-8",
    "swagger-ui.css": b"text/css; charset=utf-8",
}

_HEADERS = (
    (
        b"content-security-policy",  # nothing of any other host, and no script but ours
        b"default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline';"
        b" img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


class DocsRoutes:
    """The handlers, and the addresses that they answer at."""

    def __init__(self, routes: Iterable[Route], issuer: str) -> None:
        """Describe these routes, as they are when somebody first asks."""
        self._routes = routes
        self._issuer = issuer

    def routes(self) -> dict[str, Handlers]:
        """List the addresses."""
        return {
            "/openapi.json": {"GET": self.document},
            "/docs": {"GET": self.page},
            "/docs/{file}": {"GET": self.file},
        }

    @operation(Answer(200, Document))
    async def document(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Describe the HTTP (OpenAPI 3.1)."""
        await answer(send, 200, self._document, JSON)

    @operation(Answer(200, says="A page.", media="text/html"))
    async def page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Show the description."""
        await _answer_file(send, "index.html")

    @operation(Answer(200, says="A file.", media="*/*"), refuses=(NotFound,))
    async def file(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a part of the page that shows it."""
        await _answer_file(send, scope["path_params"]["file"])

    @cached_property
    def _document(self) -> bytes:
        return msgspec.json.encode(describe(self._routes, self._issuer))


async def _answer_file(send: Send, name: str) -> None:
    if name not in _FILES:
        raise NotFound
    content, encoding = _read(name)
    await answer(send, 200, content, (b"content-type", _FILES[name]), *encoding, *_HEADERS)


@cache
def _read(name: str) -> tuple[bytes, Sequence[tuple[bytes, bytes]]]:
    """Read a file, and the header that says so where it is shipped compressed, as the large ones are."""
    folder = files("tokenauth.web") / "pages"
    shipped = folder / f"{name}.gz"
    if shipped.is_file():
        return shipped.read_bytes(), [(b"content-encoding", b"gzip")]
    return (folder / name).read_bytes(), []
