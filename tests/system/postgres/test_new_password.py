"""A new password for PostgreSQL, as docs/production.md changes it: its statements, with passwords and pg_hba.conf."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from tests.contract.conftest import token
from tests.support.documents import blocks, read, rows, section
from tests.support.journal import until
from tests.support.postgres import Cluster, cluster
from tests.support.servers import START
from tokenauth.errors import StartError
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store
from tokenauth.stores.store import Store

GUIDE = section(read("docs/production.md"), "### A secret changes")


def rule(role: str) -> str:
    """Return the line of docs/scaling.md that lets a role in. The PostgreSQL of tests has no TLS: not only with it."""
    table = rows(section(read("docs/scaling.md"), "## What to set in PostgreSQL"))
    [meaning] = [meaning for setting, meaning in table if setting == "`pg_hba.conf`"]
    shown = meaning.split("`")[1]
    assert shown.split()[:3] == ["hostssl", "all", "tokenauth"]
    return shown.replace("hostssl", "host", 1).replace(" tokenauth ", f" {role} ") + "\n"


@pytest.fixture
def strict() -> Iterator[Cluster]:
    """Run a server that asks for passwords, and lets in the role of the service only."""
    with cluster(fsync=False) as made:
        made.create("rotated")
        made.execute("ALTER ROLE tokenauth PASSWORD 'old'")
        rules = made.directory / "data" / "pg_hba.conf"
        rules.write_text(f"local all postgres trust\n{rule('tokenauth')}")
        reload(made, "SELECT pg_reload_conf()", rules=2)
        yield made


def reload(cluster: Cluster, statement: str, rules: int) -> None:
    """Reload the rules, and wait until the server has read them."""
    before = cluster.log.read_text().count("received SIGHUP")
    cluster.execute(statement)
    assert len(cluster.execute("SELECT FROM pg_hba_file_rules WHERE error IS NULL")) == rules
    until(lambda: cluster.log.read_text().count("received SIGHUP") > before, "the server reloads")


@asynccontextmanager
async def connected(cluster: Cluster, role: str, password: str) -> AsyncIterator[Store]:
    url = cluster.url("rotated").replace("tokenauth@", f"{role}:{password}@")
    store = open_store(DatabaseSettings(url=url), 10)
    await store.start()
    yield store
    await store.stop(START)


async def refused(cluster: Cluster, role: str, password: str, reason: str) -> None:
    with pytest.raises(StartError, match=reason):
        async with connected(cluster, role, password):
            pass


async def test_the_statements_for_a_new_password_work(strict: Cluster) -> None:
    [create] = blocks(GUIDE, "sql")
    lock_first, unlock_first, lock_second = re.findall(r"`(ALTER ROLE [^`]*)`", GUIDE)
    [reload_rules] = re.findall(r"`(SELECT pg_reload_conf\(\))`", GUIDE)
    one, two, three = (token(number) for number in range(3))
    async with connected(strict, "tokenauth", "old") as old:
        await old.tokens.issue(one, 0, START)
        for statement in filter(str.strip, create.split(";")):
            strict.execute(statement)
        await refused(strict, "tokenauth_2", "NEW", "no pg_hba.conf entry")
        with (strict.directory / "data" / "pg_hba.conf").open("a") as rules:
            rules.write(rule("tokenauth_2"))
        reload(strict, reload_rules, rules=3)
        async with connected(strict, "tokenauth_2", "NEW") as new:  # while machines are restarted one after the other
            assert await new.tokens.get(one.digest) == one
            await new.tokens.issue(two, 0, START)
            assert await old.tokens.get(two.digest) == two
    strict.execute(lock_first)
    await refused(strict, "tokenauth", "old", "not permitted to log in")
    async with connected(strict, "tokenauth_2", "NEW") as new:
        assert await new.tokens.revoke(one.digest, START)
        strict.execute(unlock_first)
        await refused(strict, "tokenauth", "old", "password authentication failed")
        async with connected(strict, "tokenauth", "NEWER") as again:
            assert await again.tokens.get(one.digest) is None
            await again.tokens.issue(three, 0, START)
            assert await new.tokens.get(three.digest) == three
    strict.execute(lock_second)
    await refused(strict, "tokenauth_2", "NEW", "not permitted to log in")
    async with connected(strict, "tokenauth", "NEWER") as again:
        assert await again.tokens.get(three.digest) == three
