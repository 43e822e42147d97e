"""The API documentation: /openapi.json, and /docs, which shows it with Swagger UI."""

from collections.abc import Callable, Mapping
from functools import cache, cached_property
from importlib.resources import files

import msgspec
from starlette.responses import Response

from tokenauth.web.exceptions import NotFound
from tokenauth.web.openapi import Document
from tokenauth.web.requests import Request
from tokenauth.web.responses import NoStoreResponse
from tokenauth.web.routing import Route

_MEDIA_TYPES = {
    "index.html": "text/html",
    "start.js": "text/javascript",
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
}

_HEADERS = {
    # Nothing from another host, and no script but ours. Swagger UI sets styles.
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src 'self';"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
}


class DocsRoutes:
    def __init__(self, describe: Callable[[], Document]) -> None:
        """Serve the document that `describe` returns. It is called once, at the first request."""
        self._describe = describe

    def routes(self) -> list[Route]:
        return [
            Route("/openapi.json", {"GET": self.document}),
            Route("/docs", {"GET": self.page}),
            Route("/docs/{file}", {"GET": self.file}),
        ]

    async def document(self, request: Request) -> Response:
        return NoStoreResponse(self._document, media_type="application/json")

    async def page(self, request: Request) -> Response:
        return _file_response("index.html")

    async def file(self, request: Request) -> Response:
        return _file_response(request.path_params["file"])

    @cached_property
    def _document(self) -> bytes:
        return msgspec.json.encode(self._describe()) + b"\n"


def _file_response(name: str) -> Response:
    if name not in _MEDIA_TYPES:
        raise NotFound
    content, headers = _read(name)
    return NoStoreResponse(content, headers=headers, media_type=_MEDIA_TYPES[name])


@cache
def _read(name: str) -> tuple[bytes, Mapping[str, str]]:
    """Return a file of `pages/docs/` and its headers. Large files are shipped compressed."""
    folder = files("tokenauth.web") / "pages" / "docs"
    compressed = folder / f"{name}.gz"
    if compressed.is_file():
        return compressed.read_bytes(), {**_HEADERS, "Content-Encoding": "gzip"}
    return (folder / name).read_bytes(), _HEADERS
