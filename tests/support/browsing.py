"""A browser without a screen: keeps cookies as browsers do, and fills in the forms of the login page."""

import re
from html import unescape
from typing import NamedTuple
from urllib.parse import quote

import httpx


class Cookie(NamedTuple):
    """A Set-Cookie header."""

    name: str
    value: str
    attributes: frozenset[str]

    @property
    def deletes(self) -> bool:
        return "Max-Age=0" in self.attributes


def cookies_of(answer: httpx.Response) -> list[Cookie]:
    """Return what an answer sets and deletes."""
    found = []
    for header in answer.headers.get_list("set-cookie"):
        pair, *attributes = header.split("; ")
        name, _, value = pair.partition("=")
        found.append(Cookie(name, value, frozenset(attributes)))
    return found


def hidden(page: str, name: str) -> str:
    """Return the value of a hidden field of a page."""
    match = re.search(rf'<input type="hidden" name="{name}" value="([^"]*)">', page)
    assert match is not None, page
    return unescape(match[1])


def text_of(page: str) -> str:
    """Return what a page shows, on one line."""
    body = page.partition("<body>")[2]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def _with(path: str, rd: str | None) -> str:
    return path if rd is None else f"{path}?rd={quote(rd, safe='')}"


class Visitor:
    """One browser at the login page."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self.cookies: dict[str, str] = {}

    def get(self, path: str, rd: str | None = None, **headers: str) -> httpx.Response:
        return self._keep(self._client.get(_with(path, rd), headers=self._headers(headers)))

    def post(self, path: str, fields: dict[str, str], rd: str | None = None, **headers: str) -> httpx.Response:
        """Send a form, with `rd` in the query."""
        return self._keep(self._client.post(_with(path, rd), data=fields, headers=self._headers(headers)))

    def log_in(self, username: str = "ann", password: str = "ann-secret", rd: str = "", **more: str) -> httpx.Response:
        """Open the login page and send its form."""
        page = self.get("/login", rd or None).text
        fields = {"csrf": hidden(page, "csrf"), "rd": hidden(page, "rd"), "username": username, "password": password}
        return self.post("/login", {**fields, **more})

    def log_out(self) -> httpx.Response:
        """Open the page for it and press its button."""
        page = self.get("/logout").text
        return self.post("/logout", {"csrf": hidden(page, "csrf"), "rd": hidden(page, "rd")})

    def _headers(self, headers: dict[str, str]) -> dict[str, str]:
        self._client.cookies.clear()  # the client is shared
        cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return {"Accept": "text/html,*/*;q=0.8", **({"Cookie": cookies} if cookies else {}), **sent}

    def _keep(self, answer: httpx.Response) -> httpx.Response:
        for cookie in cookies_of(answer):
            if cookie.deletes:
                self.cookies.pop(cookie.name, None)
            else:
                self.cookies[cookie.name] = cookie.value
        return answer
