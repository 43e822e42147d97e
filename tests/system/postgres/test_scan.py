"""A search for leaked tokens, far from the database."""

import asyncio
from pathlib import Path

from tests.support.postgres import Cluster
from tests.support.tcp_proxy import Proxy
from tests.system.postgres.nodes import write_config_for
from tokenauth.service import create_service
from tokenauth.settings.loader import load

_FOUND = 30
_DELAY = 0.05
"""Seconds in each direction. A store gives up an operation that waits for 2 seconds for a connection."""


async def test_a_scan_far_away_finds_many_tokens(postgres: Cluster, url: str, tmp_path: Path) -> None:
    with Proxy(postgres.port) as proxy:
        through = url.replace(f":{postgres.port}/", f":{proxy.port}/")
        service = create_service(load(write_config_for(through, tmp_path, "connections = 1")))
        async with service.running():
            tokens = service.tokens
            logins = [tokens.issue("ann", "ann-secret", f"10.0.0.{number}", "a browser") for number in range(_FOUND)]
            values = [issued.value for issued in await asyncio.gather(*logins)]
            proxy.delay(_DELAY)
            found = await tokens.find_in("\n".join(values).encode())
            proxy.heal()
    assert {token.address for token, _ in found} == {f"10.0.0.{number}" for number in range(_FOUND)}
    assert {(token.user_agent, status) for token, status in found} == {("a browser", "valid")}
