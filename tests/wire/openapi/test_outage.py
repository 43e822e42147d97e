"""The answers of a server that cannot serve are documented, too."""

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest

from tests.support.servers import worker, write_config
from tests.wire.openapi.asking import BODIES, FORM, GRANT, PASSWORD, Asker, client_of_oauth, login
from tests.wire.openapi.configurations import APART, speaking
from tests.wire.openapi.conformance import Documented


@pytest.fixture(scope="module")
def settings() -> str:
    """Serve all dialects without a token, so that their own refusals are tested."""
    return speaking(**APART)


@contextmanager
def hidden(directory: Path, *tables: str) -> Iterator[None]:
    """Take tables away from under the running server."""
    with closing(sqlite3.connect(directory / "tokenauth.db", isolation_level=None)) as database:
        for table in tables:
            database.execute(f"ALTER TABLE {table} RENAME TO {table}_elsewhere")
        try:
            yield
        finally:
            for table in tables:
                database.execute(f"ALTER TABLE {table}_elsewhere RENAME TO {table}")


NEEDS_NO_STORE = {
    ("GET", "/healthz"),
    ("GET", "/readyz"),  # has a test of its own
    ("DELETE", "/api/token"),  # is kept in memory until it can be written
    ("GET", "/.well-known/oauth-authorization-server"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/docs/{file}"),
}


def test_with_the_store_down_every_operation_answers_as_documented(
    asker: Asker, documented: Documented, directory: Path
) -> None:
    """What needs no store is served; of all others none says that anything is invalid."""
    headers = {"X-Token": asker.token("ann"), **PASSWORD}
    served = set()
    with hidden(directory, "tokens", "pool_tokens", "failures"):
        for operation in documented:
            if operation.body == FORM:
                asked: dict[str, Any] = client_of_oauth(**GRANT, token="x" * 64)
            else:
                asked = {"headers": headers, **BODIES[operation.body]}
            if (operation.method, operation.path) == ("GET", "/api/token"):
                asked["params"] = {"token": "x" * 64}
            answer = asker.ask_for(operation, **asked)
            if answer.status_code == 503 and operation.path != "/readyz":
                assert answer.json()["error"] == "store_unavailable"
                assert int(answer.headers["retry-after"]) > 0
            else:
                served.add((operation.method, operation.path))
    assert served == NEEDS_NO_STORE


def test_a_server_that_is_not_ready_says_so_as_documented(asker: Asker, directory: Path) -> None:
    asker.token("ann")  # what is written ends what an outage leaves behind
    assert asker.ask("GET", "/readyz").status_code == 200
    with hidden(directory, "alembic_version"):
        answer = asker.ask("GET", "/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
    assert asker.ask("GET", "/readyz").status_code == 200


def test_too_many_logins_at_once_are_refused_as_documented(tmp_path: Path) -> None:
    """One hash at a time that takes long, and one that may wait: most of many at once are too many."""
    busy = "[passwords]\nmemory_kib = 65536\ntime_cost = 3\nthreads = 1\nqueue = 1\n"
    together = Barrier(8)

    def ask(number: int) -> tuple[int, str]:
        with server.client() as client:
            asker = Asker(client, documented)
            together.wait()
            if number % 2:
                answer = asker.ask("POST", "/api/token", **login("x", f"nobody {number}"))
            else:
                fields = {"client_id": f"nobody {number}", "client_secret": "x"}
                answer = asker.ask("POST", "/oauth/token", data={**GRANT, **fields})
            return answer.status_code, answer.text

    with worker(write_config(tmp_path, users=busy)) as server, ThreadPoolExecutor(8) as threads:
        documented = Documented(httpx.get(f"{server.url}/openapi.json").json())
        refused = [body for status, body in threads.map(ask, range(8)) if status == 503]
    assert len(refused) >= 3
    assert all('"error":"overloaded"' in body for body in refused)
