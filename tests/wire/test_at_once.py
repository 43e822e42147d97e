"""A valid token gets the same answer whether the server asks before it calls the application, or not."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.connections import Answer, Connection
from tests.support.servers import HandClock, Server, worker

ORIGIN = "https://app.example.com"
NAME = "__Secure-tokenauth"
POSTED = {"X_Forwarded_Method": "POST", "X_Forwarded_Proto": "https", "X_Forwarded_Host": "app.example.com"}


@pytest.fixture(scope="module")
def settings() -> str:
    return f"""
[browser]
url = "https://auth.example.com"
domain = "example.com"
return_to = ["https://*.example.com"]
[server]
trusted_proxies = ["127.0.0.1"]
cors_origins = ["{ORIGIN}"]
"""


@pytest.fixture(scope="module")
def logging(directory: Path, clock: HandClock, config_file: Path, server: Server) -> Iterator[Server]:
    """Run a worker on the same database that logs each request: there the application is always called."""
    config = directory / "logging.toml"
    config.write_text(config_file.read_text().replace("[server]", "[server]\naccess_log = true"))
    config.chmod(0o600)
    with worker(config, clock) as running:
        yield running


def answers(server: Server, token: str, **headers: str) -> Mapping[str, Answer]:
    """Return the answers to requests that show a token in different ways, without their dates."""
    cookie = f"{NAME}={token}"
    requests: list[tuple[str, Mapping[str, str]]] = [
        (f"/api/token?token={token}", {}),
        (f"/api/%74oken?token={token}", {}),
        (f"/api/token?token={token}&touch=0", {}),
        (f"/api/token?token={token}", {"X_Token": "x"}),
        ("/api/token", {"X_Token": token}),
        ("/api/token", {"X_Token": token, "Authorization": "Bearer x"}),
        ("/api/token", {}),
        ("/auth", {"X_Token": token}),
        ("/auth", {"Authorization": f"Bearer {token}"}),
        ("/auth", {"X_Token": token, "Authorization": "Bearer x"}),
        ("/auth", {"Cookie": cookie}),
        ("/auth", {}),
        ("/auth?scope=admin", {"X_Token": token}),
        ("/auth?scope=nothing", {"X_Token": token}),
        ("/auth?scope=", {"X_Token": token}),
        ("/auth?touch=0", {"X_Token": token}),
        ("/auth?unknown", {"X_Token": token}),
        ("/auth?cookie&header=x-token", {"X_Token": token, "Authorization": "Bearer x"}),
        ("/auth?cookie&login=redirect", {"Cookie": cookie}),
        ("/auth?cookie&login=redirect", {"Cookie": f"{cookie}; {NAME}=x"}),
        ("/auth?cookie", {"Cookie": cookie, **POSTED, "Sec_Fetch_Site": "same-origin"}),
        ("/auth?cookie", {"Cookie": cookie, **POSTED, "Sec_Fetch_Site": "cross-site"}),
    ]
    with Connection(server.port) as connection:
        found = {str(request): connection.ask("GET", request[0], **{**request[1], **headers}) for request in requests}
    return {name: answer._replace(head=re.sub(rb"date: .*\r\n", b"", answer.head)) for name, answer in found.items()}


@pytest.mark.parametrize("headers", [{}, {"Origin": ORIGIN}, {"Origin": "https://evil.example"}])
def test_all_answers_are_the_same(server: Server, logging: Server, headers: dict[str, str]) -> None:
    with Connection(server.port) as connection:
        token = connection.log_in()
        for valid in (True, False):
            answers(server, token, **headers)  # from now on, the token is cached
            found = answers(server, token, **headers)
            assert found == answers(logging, token, **headers)
            statuses = [answer.status for name, answer in found.items() if "/auth" in name]
            assert (200 in statuses) is valid
            assert connection.ask("DELETE", "/api/token", X_Token=token).status == 200
