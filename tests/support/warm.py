"""Imported by the process from which others are forked: it starts the service once, logs in and stops.

What Python and the libraries do at the first use only is done here, once for all forks. It takes longer than the rest
of a start.
"""

import asyncio
import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import structlog
from starlette.types import ASGIApp

from tests.support.servers import write_config
from tokenauth import logs
from tokenauth.service import create_service
from tokenauth.settings import loader
from tokenauth.web.app import build_app


async def request(app: ASGIApp, method: str, path: str, query: str = "", body: bytes = b"") -> Any:
    """Send a request to the application, and return the JSON of the answer."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    answer = b""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal answer
        answer += message.get("body", b"")

    await app(scope, receive, send)
    return json.loads(answer)


async def use(config: Path) -> None:
    """Start the service, log in, check the token and stop."""
    service = create_service(loader.load(config))
    app = build_app(service)
    async with service.running():
        login = json.dumps({"username": "admin", "password": "admin"}).encode()
        token = (await request(app, "POST", "/api/token", body=login))["token"]
        assert (await request(app, "GET", "/api/token", f"token={token}"))["valid"]


with TemporaryDirectory() as directory:
    logs.configure(quiet=True)
    asyncio.run(use(write_config(Path(directory))))
    structlog.reset_defaults()
    logging.getLogger().handlers.clear()
