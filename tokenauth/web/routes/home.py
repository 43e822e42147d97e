"""GET /: what this service is, as a page for people and as JSON for programs."""

from importlib.resources import files
from string import Template

import msgspec
from starlette.responses import Response

from tokenauth.settings.model import Settings
from tokenauth.web.html import STYLE, policy
from tokenauth.web.requests import Request
from tokenauth.web.responses import JSONResponse, NoStoreResponse
from tokenauth.web.routes.console import CONSOLE
from tokenauth.web.routes.login import HOME, LOGIN
from tokenauth.web.routing import Handler, Route


class HomeAnswer(msgspec.Struct, omit_defaults=True):
    service: str
    health: str
    console: str
    docs: str | None = None
    openapi: str | None = None
    login: str | None = None


class HomeRoutes:
    def __init__(self, settings: Settings, show_logins: Handler | None) -> None:
        """`show_logins` is the page that people get instead, if there is a login page."""
        docs, login = settings.server.docs, settings.browser.url and f"{settings.browser.origin}{LOGIN}"
        found = HomeAnswer(
            "tokenauth", "/readyz", CONSOLE, "/docs" if docs else None, "/openapi.json" if docs else None, login or None
        )
        self._answer = JSONResponse(found)
        self._page = _page(docs)
        self._show_page = show_logins or self.page

    def routes(self) -> list[Route]:
        return [Route(HOME, {"GET": self.show})]

    async def show(self, request: Request) -> Response:
        # Browsers list text/html when a person opens an address. curl and libraries accept anything, by "*/*".
        if b"text/html" in (request.header(b"accept") or b""):
            return await self._show_page(request)
        return self._answer

    async def page(self, request: Request) -> Response:
        return self._page


def _page(docs: bool) -> Response:
    links = [("readyz", "Is it ready?")]
    if docs:
        links = [("docs", "API documentation"), ("openapi.json", "OpenAPI document"), *links]
    template = Template((files("tokenauth.web") / "pages" / "home.html").read_text(encoding="utf-8"))
    others = " ".join(f'<a href="{address}">{text}</a>' for address, text in links)
    text = template.substitute(style=STYLE, links=others)
    return NoStoreResponse(text, headers={"Content-Security-Policy": policy("'none'")}, media_type="text/html")
