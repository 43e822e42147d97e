"""A login at the login page replaces that of the cookie: either both steps apply, or none."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from tests.support.browsing import hidden
from tests.support.faulty import Faulty
from tests.support.servers import write_config
from tokenauth import revocation_queue
from tokenauth.service import Service, create_service
from tokenauth.settings import loader
from tokenauth.web.app import build_app
from tokenauth.web.asgi_extensions import CLIENT

URL = "http://localhost:8000"


class Browser:
    """A browser that is logged in, and can disconnect."""

    def __init__(self, service: Service, store: Faulty) -> None:
        self._app = build_app(service)
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(self._with_state), base_url=URL)
        self._state = {"gone": False}
        self.service = service
        self.store = store
        self.csrf = ""

    async def _with_state(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["extensions"] = {CLIENT: self._state}
        await self._app(scope, receive, send)

    async def log_in(self, password: str = "admin") -> int:
        form = {"csrf": self.csrf, "username": "admin", "password": password}
        return (await self._client.post("/login", data=form)).status_code

    async def open_form(self) -> None:
        self.csrf = hidden((await self._client.get("/login")).text, "csrf")

    def disconnect(self) -> None:
        self._state["gone"] = True

    async def logins(self) -> list[str]:
        """Return the ids of the live logins, the newest first."""
        return [token.id for token in await self.service.tokens.list_live("admin")]

    async def close(self) -> None:
        await self._client.aclose()


@pytest.fixture
async def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Browser]:
    monkeypatch.setattr(revocation_queue, "RETRY", 0.001)
    service = create_service(loader.load(write_config(tmp_path, f'[browser]\nurl = "{URL}"')))
    async with service.running():
        store = Faulty(service.store.tokens)
        service.store.tokens = store  # type: ignore[assignment]
        browser = Browser(service, store)
        await browser.open_form()
        assert await browser.log_in() == 303
        yield browser
        await browser.close()


async def test_a_new_login_ends_that_of_the_cookie(browser: Browser) -> None:
    [old] = await browser.logins()
    assert await browser.log_in() == 303
    [new] = await browser.logins()
    assert new != old


async def test_a_failed_login_ends_nothing(browser: Browser) -> None:
    old = await browser.logins()
    assert await browser.log_in("wrong") == 401
    browser.store.writing = OSError(28, "no space")
    assert await browser.log_in() in {500, 503}
    browser.store.writing = None
    assert await browser.logins() == old


@pytest.mark.parametrize("stopping", [False, True])
async def test_a_login_that_cannot_replace_is_taken_back(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, stopping: bool
) -> None:
    """The old login cannot be ended, and its client disconnects meanwhile or the server stops."""
    monkeypatch.setattr(revocation_queue, "MAX_PER_NETWORK", 0)
    [old] = await browser.logins()
    browser.store.poison = next(token.digest for token in await browser.service.tokens.list_live("admin"))
    attempt = asyncio.create_task(browser.log_in())
    while not browser.store.poisoned:  # noqa: ASYNC110 - an event would be one more thing to share
        await asyncio.sleep(0)
    if stopping:
        attempt.cancel()
    else:
        browser.disconnect()
    assert await attempt == 503
    assert await browser.logins() == [old]
