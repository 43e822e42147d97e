"""The programs in `examples` work as documented."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from examples import fencing
from tests.support.servers import HandClock, Server, log_in, spawn
from tests.wire.client.issuers import token


@pytest.fixture(scope="module")
def settings() -> str:
    """Configure the pool that the examples use."""
    return "[pools.permits]\ncapacity = 1\nprefill = true\nlease_ttl = 1800"


@pytest.fixture
def pool(server: Server) -> Iterator[httpx.Client]:
    """Return a client for the pool, with a login."""
    with server.client() as client:
        token = log_in(client)
    with httpx.Client(base_url=f"{server.url}/api/pools/permits/", headers={"X-Token": token}) as connected:
        yield connected


def test_a_resource_with_fences_refuses_a_late_write(pool: httpx.Client, clock: HandClock) -> None:
    notebook = fencing.FencedNotebook()
    assert not fencing.run(notebook, pool, clock.advance)
    assert [line.partition(":")[0] for line in notebook.lines] == ["Ann", "Bob"]


def test_without_a_fence_check_the_late_write_succeeds(pool: httpx.Client, clock: HandClock) -> None:
    notebook = fencing.Notebook()
    assert fencing.run(notebook, pool, clock.advance)
    assert [line.partition(":")[0] for line in notebook.lines] == ["Ann", "Bob", "Ann"]


def test_the_example_runs_as_described(server: Server, clock: HandClock, capsys: pytest.CaptureFixture[str]) -> None:
    fencing.main(["--url", server.url], clock.advance)
    output = capsys.readouterr().out
    assert "FencedNotebook: Ann's late write was refused." in output
    assert "\nNotebook: Ann's late write was accepted." in output


@contextmanager
def uvicorn(app: str, directory: Path, **environment: str) -> Iterator[httpx.Client]:
    """Run an example as documented, on a free port, and return a client."""
    command = [sys.executable, "-m", "uvicorn", app, "--http", "h11", "--port", "0"]
    with spawn(command, directory, environment) as running:
        while (found := re.search(r"running on (http://\S+)", running.log.read_text())) is None:
            assert running.process.poll() is None, running.log.read_text()
            time.sleep(0.005)
        with httpx.Client(base_url=found[1], timeout=30) as client:
            yield client
        running.stop()
        assert "Finished server process" in running.log.read_text()
        assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def starlette_app(server: Server, directory: Path) -> Iterator[httpx.Client]:
    with uvicorn("examples.starlette_app:app", directory, TOKENAUTH_URL=server.url) as client:
        yield client


@pytest.fixture(scope="module")
def fastapi_app(server: Server, directory: Path, starlette_app: httpx.Client) -> Iterator[httpx.Client]:
    """Run the FastAPI example, which calls the Starlette example."""
    with uvicorn(
        "examples.fastapi_app:app",
        directory,
        TOKENAUTH_URL=server.url,
        NEIGHBOUR_URL=str(starlette_app.base_url),
        ROBOT_NAME="bob",
        ROBOT_PASSWORD="bob-secret",
    ) as client:
        yield client


@pytest.fixture
def admin(server: Server) -> dict[str, str]:
    """Log in as a user with the scope `admin`."""
    with server.client() as client:
        return {"X-Token": log_in(client)}


@pytest.fixture
def ann(server: Server) -> dict[str, str]:
    """Log in as a user without the scope `admin`."""
    with server.client() as client:
        return {"X-Token": log_in(client, "ann", "ann-secret")}


def test_the_fastapi_example_guards_its_routes(
    fastapi_app: httpx.Client, admin: dict[str, str], ann: dict[str, str]
) -> None:
    assert fastapi_app.get("/orders").status_code == 401
    assert fastapi_app.get("/orders", headers={"X-Token": token(1).decode()}).status_code == 401
    assert fastapi_app.get("/orders", headers=ann).json() == {"for": "ann", "orders": []}
    assert fastapi_app.delete("/orders", headers=ann).status_code == 403
    assert fastapi_app.delete("/orders", headers=admin).json() == {"deleted by": "admin"}
    assert fastapi_app.get("/openapi.json").status_code == 200


def test_the_fastapi_example_calls_a_service_as_itself(fastapi_app: httpx.Client, ann: dict[str, str]) -> None:
    assert fastapi_app.get("/neighbour").status_code == 401
    assert fastapi_app.get("/neighbour", headers=ann).json() == {"the neighbour says": {"hello": "bob"}}


def test_the_starlette_example_guards_its_routes(
    starlette_app: httpx.Client, admin: dict[str, str], ann: dict[str, str]
) -> None:
    assert starlette_app.get("/healthz").json() == {"status": "ok"}
    assert [starlette_app.get(path).status_code for path in ("/greeting", "/report")] == [401, 401]
    assert starlette_app.get("/greeting", headers=ann).json() == {"hello": "ann"}
    assert starlette_app.get("/report", headers=ann).status_code == 403
    assert starlette_app.get("/report", headers=admin).json() == {"for": "admin", "scopes": ["admin"]}


def test_the_websocket_example_reads_a_token_first(starlette_app: httpx.Client, ann: dict[str, str]) -> None:
    address = str(starlette_app.base_url.copy_with(scheme="ws", path="/chat"))
    with connect(address, proxy=None) as websocket:
        websocket.send(ann["X-Token"])
        assert websocket.recv() == '{"hello":"ann"}'
    with connect(address, proxy=None) as websocket:
        websocket.send("let me in")
        with pytest.raises(ConnectionClosed) as caught:
            websocket.recv()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1008
