"""The module for web pages, /tokenauth.js, and its types for TypeScript, /tokenauth.d.ts."""

import hashlib
from importlib.resources import files

from starlette.responses import Response

from tokenauth.web.requests import Request
from tokenauth.web.routing import Handler, Route

MODULE, TYPES = "/tokenauth.js", "/tokenauth.d.ts"

_MEDIA_TYPES = {MODULE: "text/javascript", TYPES: "text/plain"}  # text/plain: browsers show it

_HEADERS = {
    # Any page may import the module. It is the same for everyone, and says nothing about this service or its users.
    "Access-Control-Allow-Origin": "*",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Cache-Control": "public, max-age=300",
}


def javascript_routes() -> list[Route]:
    """List the routes. They have no CORS middleware: their answers are the same for pages of any origin."""
    return [Route(path, {"GET": _file_handler(path)}) for path in _MEDIA_TYPES]


def _file_handler(path: str) -> Handler:
    """Return a handler that sends a file, or `304` to a browser that has it. The responses are made once."""
    content = (files("tokenauth.web") / "pages" / path.removeprefix("/")).read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": etag}
    complete = Response(content, headers=headers, media_type=_MEDIA_TYPES[path])
    not_modified = Response(status_code=304, headers=headers)

    async def send_file(request: Request) -> Response:
        return not_modified if _names(request.headers.get("if-none-match", ""), etag) else complete

    return send_file


def _names(if_none_match: str, etag: str) -> bool:
    """Return whether the header names the entity tag. Proxies that compress make it a weak one (RFC 9110 13.1.2)."""
    return etag in {each.strip().removeprefix("W/") for each in if_none_match.split(",")}
