"""The console, /console: one page for people and operators. It calls the public API and has no routes of its own."""

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from string import Template
from typing import NamedTuple

from starlette.responses import Response

from tokenauth.web.exceptions import NotFound
from tokenauth.web.requests import Request
from tokenauth.web.responses import NoStoreResponse
from tokenauth.web.routing import Route

CONSOLE = "/console"

_MEDIA_TYPES = {"js": "text/javascript", "css": "text/css"}

_HEADERS = {
    # Stricter than /docs: no inline styles, and no script may write HTML (Trusted Types).
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self';"
    " img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_FILE_HEADERS = {**_HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
"""The address of a file has the version of all files, and relative imports keep it: an upgrade never mixes two."""


class _Files(NamedTuple):
    version: str
    page: str
    responses: Mapping[str, Response]


class ConsoleRoutes:
    def routes(self) -> list[Route]:
        return [
            Route(CONSOLE, {"GET": self.page}),
            Route(f"{CONSOLE}/{{version}}/{{file}}", {"GET": self.file}),
        ]

    async def page(self, request: Request) -> Response:
        return NoStoreResponse(_files().page, headers=_HEADERS, media_type="text/html")

    async def file(self, request: Request) -> Response:
        """Send a file of this version. That of another version is no longer here, or not yet."""
        found = _files().responses.get(request.path_params["file"])
        if found is None or request.path_params["version"] != _files().version:
            raise NotFound
        return found


def version() -> str:
    """Return what names the files of the console as they are now."""
    return _files().version


@cache
def _files() -> _Files:
    """Read the page and its files. Libraries are shipped compressed."""
    pages = files("tokenauth.web") / "pages"
    found = {file.name: file.read_bytes() for file in (pages / "console").iterdir() if file.is_file()}
    found["style.css"] = (pages / "style.css").read_bytes()
    page = Template(found.pop("console.html").decode())
    digest = hashlib.sha256()
    responses = {}
    for name, content in sorted(found.items()):
        file, compressed = name.removesuffix(".gz"), name.endswith(".gz")
        media_type = _MEDIA_TYPES.get(file.rpartition(".")[2])
        if media_type is not None:  # the others are licences
            digest.update(b"%s %d\n%s" % (name.encode(), len(content), content))
            headers = {**_FILE_HEADERS, "Content-Encoding": "gzip"} if compressed else _FILE_HEADERS
            responses[file] = Response(content, headers=headers, media_type=media_type)
    version = digest.hexdigest()[:16]
    return _Files(version, page.substitute(version=version), responses)
