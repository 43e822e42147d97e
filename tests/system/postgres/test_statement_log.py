"""A PostgreSQL that logs all statements logs no pool token and no holder, if it is configured as documented."""

import re

import pytest

from tests.support.postgres import Cluster
from tests.support.servers import ROOT
from tokenauth.models import Pool
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store

NOW = 1_800_000_000.0
PARAMETERS = "log_parameter_max_length"


@pytest.mark.parametrize("quiet", [False, True], ids=["default", "as documented"])
async def test_a_log_of_statements_has_no_token_and_no_holder(postgres: Cluster, url: str, quiet: bool) -> None:
    """With the default setting it logs them, which shows that the test can fail."""
    name = url.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE \"{name}\" SET log_statement = 'all'")
    if quiet:
        assert re.search(rf"^\| .*`{PARAMETERS} = 0`", (ROOT / "docs/scaling.md").read_text(), re.MULTILINE)
        postgres.execute(f'ALTER DATABASE "{name}" SET {PARAMETERS} = 0')
    began = postgres.log.stat().st_size
    store = open_store(DatabaseSettings(url=url), 10)
    await store.start()
    try:
        pool = Pool("p", 60)
        await store.pools.generate(pool, ["canary-token"], NOW)
        await store.pools.assign(pool, "canary-holder", NOW)
        await store.pools.get(pool, "canary-token", NOW)
        await store.pools.release(pool, "canary-token", NOW)
        await store.pools.delete(pool, "canary-token", NOW)
    finally:
        await store.stop(NOW)
    logged = postgres.log.read_bytes()[began:]
    assert b"pool_tokens" in logged, "must log statements"
    assert [word for word in (b"canary-token", b"canary-holder") if word in logged] == (
        [] if quiet else [b"canary-token", b"canary-holder"]
    )
