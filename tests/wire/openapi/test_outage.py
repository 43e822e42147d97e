"""The responses of a server with a broken store or a full queue are documented."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest

from tests.support.patience import LONG, be_patient
from tests.support.servers import worker, write_config
from tests.wire.openapi.checked_client import (
    BODIES,
    FORM,
    GRANT,
    PASSWORD,
    CheckedClient,
    client_form,
    example_path,
    login,
)
from tests.wire.openapi.configurations import ALL_DIALECTS, with_dialects
from tests.wire.openapi.conformance import Documented, Operation
from tokenauth.errors import Overloaded
from tokenauth.service import Service, create_service
from tokenauth.settings import loader
from tokenauth.stores.batching import LIMIT
from tokenauth.stores.changes.clock import SaveTime
from tokenauth.stores.sqlite import writer
from tokenauth.web.app import build_app


@pytest.fixture(scope="module")
def settings() -> str:
    """Serve all dialects without a token, so that their own refusals are tested."""
    return with_dialects(**ALL_DIALECTS)


@contextmanager
def hidden(directory: Path, *tables: str) -> Iterator[None]:
    """Rename tables of the running server, so that its queries fail."""
    with closing(sqlite3.connect(directory / "tokenauth.db", isolation_level=None)) as database:
        for table in tables:
            database.execute(f"ALTER TABLE {table} RENAME TO {table}_hidden")
        try:
            yield
        finally:
            for table in tables:
                database.execute(f"ALTER TABLE {table}_hidden RENAME TO {table}")


NEEDS_NO_STORE = {
    ("GET", "/"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),  # has its own test
    ("DELETE", "/api/token"),  # kept in memory until it can be written
    ("GET", "/.well-known/oauth-authorization-server"),
    ("GET", "/openapi.json"),
    ("GET", "/console"),
    ("GET", "/console/{version}/{file}"),
    ("GET", "/docs"),
    ("GET", "/docs/{file}"),
    ("GET", "/tokenauth.js"),
    ("GET", "/tokenauth.d.ts"),
}


def test_with_the_store_down_answers_are_documented(
    api: CheckedClient, documented: Documented, directory: Path
) -> None:
    """Operations that need the store answer 503, never that something is invalid."""
    headers = {"X-Token": api.token("ann"), **PASSWORD}
    served = set()
    with hidden(directory, "tokens", "pool_tokens", "failures"):
        for operation in documented:
            if operation.body == FORM:
                options: dict[str, Any] = client_form(**GRANT, token="x" * 64)
            else:
                options = {"headers": headers, **BODIES[operation.body]}
            if (operation.method, operation.path) == ("GET", "/api/token"):
                options["params"] = {"token": "x" * 64}
            answer = api.send_to(operation, **options)
            if answer.status_code == 503 and operation.path != "/readyz":
                assert answer.json()["error"] == "store_unavailable"
                assert int(answer.headers["retry-after"]) > 0
            else:
                served.add((operation.method, operation.path))
    assert served == NEEDS_NO_STORE


def test_not_ready_is_answered_as_documented(api: CheckedClient, directory: Path) -> None:
    api.token("ann")  # a successful write ends the effects of the outage before
    assert api.send("GET", "/readyz").status_code == 200
    with hidden(directory, "alembic_version"):
        answer = api.send("GET", "/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
    assert api.send("GET", "/readyz").status_code == 200


async def fill_queue(service: Service) -> list[Awaitable[None]]:
    """Add changes until no more may wait behind the commit that is being made."""
    added: list[Awaitable[None]] = []
    while len(added) < 2 * LIMIT:
        try:
            added.append(service.store.engine.apply(SaveTime(now=service.clock())))
        except Overloaded:
            await asyncio.sleep(0)  # until the commit has begun, with the first half
    return added


def example(operation: Operation) -> dict[str, Any]:
    """Return the body that the document shows for an operation."""
    if operation.body is None:
        return {}
    content = operation.described["requestBody"]["content"][operation.body]["example"]
    return {"data" if operation.body == FORM else "json": content}


async def test_a_full_queue_of_writes_is_refused_as_documented(
    tmp_path: Path, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program holds SQLite's lock meanwhile."""
    be_patient(monkeypatch)
    monkeypatch.setattr(writer, "_PRAGMAS", (f"busy_timeout = {LONG * 1000:.0f}", *writer._PRAGMAS[1:]))
    service = create_service(loader.load(write_config(tmp_path, settings)))
    transport = httpx.ASGITransport(build_app(service))
    async with service.running(), httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        documented = Documented((await client.get("/openapi.json")).json())
        token = (await client.post("/api/token", **login("ann-secret"))).json()["token"]
        headers = {"X-Token": token, **PASSWORD}
        with closing(sqlite3.connect(tmp_path / "tokenauth.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = await fill_queue(service)
            # a log-out would end the token of the others, and events do not end
            operations = [each for each in documented if each.id not in {"logOut", "streamEvents"}]
            answers = await asyncio.gather(
                *(
                    client.request(each.method, example_path(each), headers=headers, **example(each))
                    for each in operations
                )
            )
        await asyncio.gather(*waiting, return_exceptions=True)
    overloaded = {documented.check(answer).id for answer in answers if '"error":"overloaded"' in answer.text}
    assert overloaded >= {"logIn", "assignToken", "keepLeaseAlive", "generateTokens", "tokenPoolGenerate"}


def test_a_full_login_queue_is_refused_as_documented(tmp_path: Path) -> None:
    """One slow hash at a time, and room for one to wait: most concurrent logins are refused."""
    busy = "[passwords]\nmemory_kib = 65536\ntime_cost = 3\nthreads = 1\nqueue = 1\n"
    together = Barrier(8)

    def log_in(number: int) -> tuple[int, str]:
        with server.client() as client:
            api = CheckedClient(client, documented)
            together.wait()
            if number % 2:
                answer = api.send("POST", "/api/token", **login("x", f"unknown {number}"))
            else:
                fields = {"client_id": f"unknown {number}", "client_secret": "x"}
                answer = api.send("POST", "/oauth/token", data={**GRANT, **fields})
            return answer.status_code, answer.text

    with worker(write_config(tmp_path, users=busy)) as server, ThreadPoolExecutor(8) as threads:
        documented = Documented(httpx.get(f"{server.url}/openapi.json").json())
        refused = [body for status, body in threads.map(log_in, range(8)) if status == 503]
    assert len(refused) >= 3
    assert all('"error":"overloaded"' in body for body in refused)
