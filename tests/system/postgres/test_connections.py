"""How many connections a worker and a command take, as docs/scaling.md says for CONNECTION LIMIT."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.journal import until
from tests.support.postgres import Cluster
from tests.support.servers import ROOT, serve, write_config
from tests.system.test_cli import mistake, run
from tokenauth.settings.model import DatabaseSettings

GUIDE = (ROOT / "docs" / "scaling.md").read_text()

POOL = "[pools.phones]\nmembers = [{name = 'moto'}]\n"

COMMANDS = [
    ["migrate"],
    ["tokens", "list"],
    ["tokens", "issue", "--user", "ann", "--name", "nightly"],
    ["pool", "list"],
    ["pool", "show", "phones"],
    ["pool", "line", "phones"],
    ["tokens", "revoke", "--user", "ann", "--leases"],
    ["doctor"],
]
CLIENTS = 16


@pytest.fixture
def limited(postgres: Cluster, database: str, tmp_path: Path) -> Iterator[Path]:
    """Write a configuration for a role that may have two connections, and owns an empty database."""
    name = database.rpartition("/")[2]
    postgres.execute("CREATE ROLE limited LOGIN CONNECTION LIMIT 2")
    postgres.execute(f'ALTER DATABASE "{name}" OWNER TO limited')
    config = write_config(tmp_path, POOL)
    text = config.read_text().replace(f"sqlite+aiosqlite:///{tmp_path}/tokenauth.db", database)
    config.write_text(text.replace("//tokenauth@", "//limited@"))
    yield config
    postgres.drop(name)
    postgres.execute("DROP ROLE limited")


def test_the_guide_says_what_a_worker_takes() -> None:
    default = DatabaseSettings(url="postgresql+asyncpg://a@b/c").connections
    text = " ".join(GUIDE.split())
    assert f"`[database] connections` (default {default})" in text
    assert f"**at most {default + 1} for each worker, and 2 for each command**" in text
    [first] = re.findall(r"^\| 1 \| (\d+) \| \d+ \| \d+ \|$", GUIDE, re.MULTILINE)
    assert int(first) == default + 1


def test_a_command_takes_two_connections(postgres: Cluster, limited: Path) -> None:
    for command in COMMANDS:  # again, while PostgreSQL still counts the connections of the last one
        until(lambda: run(limited.parent, *command).returncode == 0, " ".join(command))  # noqa: B023
    postgres.execute("ALTER ROLE limited CONNECTION LIMIT 1")
    assert "too many connections for role" in mistake(run(limited.parent, "tokens", "list"))


def test_a_worker_takes_its_connections_and_one(postgres: Cluster, limited: Path) -> None:
    """It keeps those that it has opened."""
    postgres.execute("ALTER ROLE limited CONNECTION LIMIT -1")
    limited.write_text(limited.read_text().replace("[database]", "[database]\nconnections = 1"))
    opened = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'limited'"
    with serve(limited, "--workers", "1") as server:
        assert asyncio.run(log_in_and_out(server.url)) == [200, 200] * CLIENTS
        until(lambda: postgres.execute(opened) == [(2,)], "those of the start have ended")


async def log_in_and_out(url: str) -> list[int]:
    """Return the statuses of clients that all log in at the same time, and then out."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def one() -> list[int]:
            issued = await client.post("/api/token", json={"username": "ann", "password": "ann-secret"})
            ended = await client.request("DELETE", "/api/token", json={"token": issued.json().get("token")})
            return [issued.status_code, ended.status_code]

        return [status for both in await asyncio.gather(*(one() for _ in range(CLIENTS))) for status in both]
