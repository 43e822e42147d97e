"""A valid token gets the same answer whether the server asks before it calls the application, or not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.connections import Answer, Connection
from tests.support.servers import HandClock, Server, worker

ORIGIN = "https://app.example.com"


@pytest.fixture(scope="module")
def settings() -> str:
    return f"[server]\ncors_origins = ['{ORIGIN}']"


@pytest.fixture(scope="module")
def logging(directory: Path, clock: HandClock, config_file: Path, server: Server) -> Iterator[Server]:
    """Run a worker on the same database that logs each request: there the application is always called."""
    config = directory / "logging.toml"
    config.write_text(config_file.read_text().replace("[server]", "[server]\naccess_log = true"))
    config.chmod(0o600)
    with worker(config, clock) as running:
        yield running


def answers(server: Server, token: str, **headers: str) -> list[Answer]:
    requests = [
        (f"/api/token?token={token}", {}),
        (f"/api/%74oken?token={token}", {}),
        ("/api/token", {"X_Token": token}),
        ("/auth", {"X_Token": token}),
        ("/auth", {"Authorization": f"Bearer {token}"}),
        ("/auth?scope=admin", {"X_Token": token}),
        ("/auth", {"X_Token": token, "Authorization": "Bearer x"}),
        ("/auth", {}),
    ]
    with Connection(server.port) as connection:
        return [connection.ask("GET", target, **own, **headers) for target, own in requests]


@pytest.mark.parametrize("headers", [{}, {"Origin": ORIGIN}, {"Origin": "https://evil.example"}])
def test_all_answers_are_the_same(server: Server, logging: Server, headers: dict[str, str]) -> None:
    with Connection(server.port) as connection:
        token = connection.log_in()
        for wanted in (200, 401):
            answers(server, token, **headers)  # from now on, the token is cached
            found = answers(server, token, **headers)
            assert found == answers(logging, token, **headers)
            assert found[3].status == wanted
            assert (b"access-control-allow-origin" in found[0].head) is (headers.get("Origin") == ORIGIN)
            assert connection.ask("DELETE", "/api/token", X_Token=token).status == 200
