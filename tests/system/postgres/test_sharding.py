"""The schema and all statements, held to what engines document that shard tables and speak PostgreSQL's protocol.

None of these engines runs here. Each rule names the page that it is from; docs/scaling.md says what follows.
"""

import asyncio
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from sqlalchemy import make_url

from tests.support.postgres import Cluster
from tests.support.servers import START
from tests.system.postgres.nodes import fetch, fixed_time, fresh, nodes
from tests.system.postgres.test_plans import OPERATIONS, Direct
from tokenauth.models import LeaseCheck, Pool, Token
from tokenauth.stores.postgres.at_once import AT_ONCE
from tokenauth.stores.postgres.connections import Connections
from tokenauth.stores.postgres.engine import PostgresEngine
from tokenauth.stores.tables import metadata

SHARDED = {"pool_tokens": "pool", "pool_requests": "pool", "forced_ends": "pool"}
"""The tables that docs/scaling.md distributes with Citus, and their distribution columns. All others stay local."""

_LOCAL = {*metadata.tables} - {*SHARDED}
_VOLATILE = r"\b(clock_timestamp|random|gen_random_uuid|nextval|pg_advisory\w+|pg_notify)\("
_KEYS = """
    SELECT i.indrelid::regclass::text, i.indexrelid::regclass::text,
        array(SELECT attname::text FROM pg_attribute WHERE attrelid = i.indrelid AND attnum = ANY (i.indkey))
    FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indrelid
    WHERE i.indisunique AND c.relnamespace = 'public'::regnamespace
"""
_CONSTRAINTS = """
    SELECT conname::text, contype::text FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace AND (contype NOT IN ('p', 'u', 'n', 'c') OR condeferrable)
"""
_SEQUENCES = "SELECT seqrelid::regclass::text FROM pg_sequence WHERE seqtypid <> 'bigint'::regtype"
_OTHER_INDEXES = """
    SELECT c.relname::text FROM pg_class AS c JOIN pg_am AS am ON am.oid = c.relam
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'i' AND am.amname <> 'btree'
"""
_INHERITED = "SELECT inhrelid::regclass::text FROM pg_inherits"
_TRIGGERS_AND_RULES = """
    SELECT tgname::text FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT rulename::text FROM pg_rewrite AS r JOIN pg_class AS c ON c.oid = r.ev_class
    WHERE c.relnamespace = 'public'::regnamespace
"""


def scopes(sql: str) -> Iterator[str]:
    """Yield the text of each query of a statement, without that of the queries in parentheses within it."""
    depth, own = 0, [""]
    for character in sql:
        if character == "(":
            depth += 1
            own.append("")
        elif character == ")":
            depth -= 1
            inner = own.pop()
            if re.match(r"\s*(WITH|SELECT|INSERT|UPDATE|DELETE)\b", inner):
                yield from inner.split("UNION ALL")
                own[-1] += "()"
            else:
                own[-1] += f"({inner})"
        else:
            own[-1] += character
    yield from own[0].split("UNION ALL")


def unrouted(sql: str, table: str, column: str) -> list[str]:
    """Return the queries of a statement that use a table without `column = $n`: they concern several shards."""
    used = rf"\b(FROM|JOIN|UPDATE|DELETE FROM) {table}\b"
    routed = rf"\b({table}\.)?{column} = \$\d+"
    plain = (re.sub(r"CASE WHEN .*? END", "", scope) for scope in scopes(sql))  # no condition in a CASE is looked at
    return [scope for scope in plain if re.search(used, scope) and not re.search(routed, scope)]


def breaks_rules_of_citus(sql: str) -> list[str]:
    """Return the rules of reference_workarounds.html and reference_ddl.html in its documentation that are broken."""
    sharded = [table for table in SHARDED if re.search(rf"\b{table}\b", sql)]
    changes = re.search(rf"\b(UPDATE|DELETE FROM|INSERT INTO) ({'|'.join(SHARDED)})\b", sql)
    broken = [
        f"a query of {table} that concerns several shards" for table in sharded if unrouted(sql, table, SHARDED[table])
    ]
    if changes and re.search(_VOLATILE, sql):
        broken.append("a volatile function in a change of a distributed table")
    if changes and changes[1] == "INSERT INTO" and "SELECT" in sql:
        broken.append("a subquery in an INSERT")
    if sharded and any(re.search(rf"\b(FROM|JOIN|INTO|UPDATE) {table}\b", sql) for table in _LOCAL):
        broken.append("distributed and local tables in one statement")
    return broken


ROUTED = "SELECT 1 FROM pool_tokens WHERE pool_tokens.pool = $1"


@pytest.mark.parametrize(
    ("sql", "count"),
    [
        (ROUTED, 0),
        ("WITH a AS ({}) UPDATE pool_tokens SET n = 1 WHERE pool = $2", 0),
        ("SELECT 1 FROM pool_tokens WHERE number = $1", 1),
        ("SELECT 1 FROM pool_tokens WHERE CASE WHEN pool = $1 THEN true ELSE false END", 1),
        ("{} UNION ALL SELECT 2 FROM pool_tokens", 1),
        ("SELECT (SELECT max(free_at) FROM pool_tokens), ({})", 1),
        ("WITH a AS ({}) UPDATE pool_tokens SET n = 1", 1),
    ],
)
def test_queries_without_the_distribution_column_are_found(sql: str, count: int) -> None:
    assert len(unrouted(sql.format(ROUTED), "pool_tokens", "pool")) == count


def test_each_broken_rule_of_citus_is_found() -> None:
    for sql in (
        "UPDATE pool_tokens SET free_at = clock_timestamp() WHERE pool = $1",
        "INSERT INTO pool_tokens (pool) SELECT pool FROM pool_requests WHERE pool = $1",
        "SELECT 1 FROM pool_tokens JOIN marks ON true WHERE pool = $1",
        "SELECT 1 FROM pool_tokens FOR UPDATE",
    ):
        assert len(breaks_rules_of_citus(sql)) == 1, sql


class Statements(NamedTuple):
    """The statements of all operations, as PostgreSQL logs them."""

    at_once: Sequence[str]
    ordinary: Sequence[str]


@pytest.fixture(scope="module")
def statements(postgres: Cluster) -> Statements:
    """Run every operation: first as on PostgreSQL, then as where statements that commit at once are refused."""
    with fresh(postgres) as url:
        return asyncio.run(_statements(postgres, url))


async def _statements(postgres: Cluster, url: str) -> Statements:
    name = make_url(url).database
    postgres.execute(f"ALTER DATABASE \"{name}\" SET log_statement = 'all'")
    connections = Connections(make_url(url), 1, fixed_time, caller_time=True)
    found = []
    for ordinary in (False, True):
        began = postgres.log.stat().st_size
        async with connections._engine.connect() as connection:
            direct = Direct(connection, ordinary)
            for ask in OPERATIONS.values():
                await direct.rows_read(ask)
        logged = postgres.log.read_bytes()[began:].decode()
        lines = re.findall(r"LOG:  (?:execute \w+|statement): (.*(?:\n\t.*)*)", logged)
        found.append(sorted({" ".join(line.split()) for line in lines}))
    await connections.discard()
    return Statements(*found)


async def test_keys_of_sharded_tables_have_the_distribution_column(url: str) -> None:
    keys = await fetch(url, _KEYS)
    assert {table for table, _, _ in keys} >= set(SHARDED)
    assert [name for table, name, columns in keys if table in SHARDED and SHARDED[table] not in columns] == []


@pytest.mark.parametrize("sql", [_CONSTRAINTS, _SEQUENCES, _OTHER_INDEXES, _INHERITED, _TRIGGERS_AND_RULES])
async def test_the_schema_has_nothing_that_engines_lack(url: str, sql: str) -> None:
    """No foreign, exclusion or deferrable constraints, small sequences, other indexes, inheritance, triggers, rules."""
    assert await fetch(url, sql) == []


def test_ordinary_statements_concern_one_shard_but_one(statements: Statements) -> None:
    """The one picks free tokens, and names the pool in a CASE only. docs/scaling.md says so."""
    assert len(statements.ordinary) > len(OPERATIONS) / 2, "must see the statements"
    [picking] = [sql for sql in statements.ordinary if breaks_rules_of_citus(sql)]
    assert re.search(r"^SELECT .* FROM pool_tokens .* FOR UPDATE SKIP LOCKED$", picking)
    assert breaks_rules_of_citus(picking) == ["a query of pool_tokens that concerns several shards"]


def test_only_statements_that_can_be_replaced_break_rules(statements: Statements) -> None:
    """The others do the same as these."""
    broken = [sql for sql in statements.at_once if breaks_rules_of_citus(sql)]
    assert broken, "must find the statements that read the clock and a pool"
    assert [sql for sql in broken if not sql.startswith("WITH") and sql not in statements.ordinary] == []


def test_no_statement_has_what_yugabytedb_lacks(statements: Statements) -> None:
    lacking = re.compile(r"\b(LOCK TABLE|CREATE TEMP|xml\w*\(|ctid|xmin|xmax|tableoid|TABLESAMPLE|DEFERRED)\b")
    assert [sql for sql in (*statements.ordinary, *statements.at_once) if lacking.search(sql)] == []


async def test_an_engine_without_these_statements_gets_ordinary_ones(url: str) -> None:
    """PostgreSQL refuses a statement that changes a table with such a rule in a part of it, as not supported."""
    for event, table in (("INSERT", "tokens"), ("INSERT", "revocations"), ("UPDATE", "pool_tokens")):
        await fetch(url, f"CREATE RULE refusing AS ON {event} TO {table} WHERE false DO INSTEAD NOTHING")
    pool = Pool("p", lease_ttl=60)
    async with nodes(url) as (node,):
        old, new = (Token.new(digest * 32, "ann", "c", START, int(START) + 100) for digest in (b"1", b"2"))
        await node.tokens.issue(old, 1, START)
        await node.tokens.issue(new, 1, START)
        assert await node.tokens.get_current(old.digest) is None
        assert await node.tokens.revoke(new.digest, START)
        await node.pools.generate(pool, ["t"], START)
        leased = (await node.pools.assign(pool, "h", START)).token
        assert leased is not None
        for change in (node.pools.keep_alive, node.pools.release):
            changed = await change(pool, "t", START, LeaseCheck("h", leased.fence))
            assert changed is not None
            assert changed.granted
        assert isinstance(node.engine, PostgresEngine)
        assert node.engine.connections._never_at_once == AT_ONCE.keys()
