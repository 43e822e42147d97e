"""The URL of a database: several hosts, one of which is the primary, and unknown options."""

import pytest
from sqlalchemy import make_url

from tests.support.postgres import Cluster
from tests.support.servers import START
from tests.support.tcp_proxy import Proxy
from tests.system.postgres.feeds import until
from tokenauth.errors import ConfigError, StartError
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store
from tokenauth.stores.postgres.engine import PostgresEngine


def several(database: str, *ports: int) -> str:
    """Return a URL with several hosts instead of one."""
    url = make_url(database)
    hosts = "&".join(f"host=127.0.0.1:{port}" for port in ports)
    return f"postgresql+asyncpg://{url.username}@/{url.database}?{hosts}"


@pytest.mark.parametrize("first", ["silent", "refusing"])
@pytest.mark.parametrize("place", [0, 1])
async def test_a_silent_host_delays_no_connection(postgres: Cluster, database: str, first: str, place: int) -> None:
    with Proxy(postgres.port) as proxy:
        proxy.freeze() if first == "silent" else proxy.cut()
        ports = [proxy.port, postgres.port] if place == 0 else [postgres.port, proxy.port]
        store = open_store(DatabaseSettings(several(database, *ports)), 10)
        await store.start()
        assert await store.ready() is None
        await store.stop(START)


async def test_a_stop_ends_the_connection_to_another_host(postgres: Cluster, database: str) -> None:
    count = (
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_control_system%' AND pid <> pg_backend_pid()"
        " AND datname = current_database()"
    )
    with Proxy(postgres.port) as proxy:
        store = open_store(DatabaseSettings(several(database, postgres.port, proxy.port)), 10)
        await store.start()
        await until(lambda: postgres.execute(count, database.rpartition("/")[2]) == [(1,)])
        await store.stop(START)
        await until(lambda: postgres.execute(count, database.rpartition("/")[2]) == [(0,)])


async def test_a_start_without_a_host_names_all_of_them(
    postgres: Cluster, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenauth.stores.postgres.engine._START_TIMEOUT", 0.5)
    with Proxy(postgres.port) as proxy, Proxy(postgres.port) as other:
        proxy.cut()
        other.cut()
        store = open_store(DatabaseSettings(several(database, proxy.port, other.port)), 10)
        places = rf"127.0.0.1:{proxy.port} refuses connections, 127.0.0.1:{other.port} refuses connections"
        with pytest.raises(StartError, match=rf"cannot be used: no host is the primary: {places}$"):
            await store.start()


@pytest.mark.parametrize("url", ["postgresql+asyncpg://ann:secret@db/tokenauth", "sqlite+aiosqlite:///tokenauth.db"])
@pytest.mark.parametrize("option", ["sslmode=verify-full", "nonsense=secret", "timeout=1", "mode=ro", "cache=shared"])
def test_an_unknown_option_is_refused_by_name(url: str, option: str) -> None:
    url = f"{url}?{option}"
    with pytest.raises(ConfigError, match=f"database.url: has no option '{option.partition('=')[0]}'") as refused:
        open_store(DatabaseSettings(url), 10)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+asyncpg://ann:secret@db.example.com", "names no database"),
        ("postgresql://ann:secret@db.example.com/tokenauth", "'postgresql' is not supported"),
        ("postgresql+psycopg://ann:secret@db.example.com/tokenauth", "'postgresql\\+psycopg' is not supported"),
        ("postgresql+asyncpg://ann:secret@db.example.com:port/tokenauth", "not a URL"),
        ("postgresql+asyncpg://ann:secret@db/tokenauth?ssl=requier", "has an ssl that is not one of disable, allow"),
        ("postgresql+asyncpg://ann:secret@db/tokenauth?ssl=", "has an option without a value"),
        ("postgresql+asyncpg://ann:secret@db/tokenauth?sslmode", "has an option without a value"),
        ("sqlite+aiosqlite:///tokenauth.db?mode", "has an option without a value"),
        ("postgresql+asyncpg://ann:secret@db/tokenauth?ssl=require&ssl=disable", "has an ssl that is not one of"),
        ("sqlite+aiosqlite://ann:secret@/tokenauth.db", "names a host or a user"),
        ("sqlite+aiosqlite://db.example.com/tokenauth.db", "names a host or a user"),
        ("sqlite+aiosqlite://", "names no file"),
    ],
)
def test_a_url_that_names_no_store_is_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"database.url: {message}") as refused:
        open_store(DatabaseSettings(url), 10)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "tokenauth:hunter@2secret@db.example.com/a",
        "tokenauth:hunter@2/secret@db.example.com/a",
        "tokenauth:secret@er2/w:rd@db.example.com/a",
        "token/auth:secret@db.example.com/a",
        "tokenauth:sec/ret@db.example.com",
    ],
)
def test_an_unencoded_password_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^database.url: ") as refused:
        open_store(DatabaseSettings(f"postgresql+asyncpg://{url}"), 10)
    assert not any(part in str(refused.value) for part in ("hunter", "secret", "ret@", "er2", "w:rd"))


@pytest.mark.parametrize(
    "options",
    ["host=a&host=b", "host=a:5432&host=b", "host=a,b&port=5432", "prepared_statement_cache_size=x"],
)
def test_conflicting_options_are_refused_in_one_line(options: str) -> None:
    with pytest.raises(ConfigError, match=r"^database.url: has options that do not fit together"):
        open_store(DatabaseSettings(f"postgresql+asyncpg://ann@/tokenauth?{options}"), 10)


@pytest.mark.parametrize("where", ["127.0.0.1:99999/tokenauth", "127.0.0.1:0/tokenauth", "/tokenauth?port=x"])
def test_an_invalid_port_is_refused_in_one_line(where: str) -> None:
    with pytest.raises(ConfigError, match=r"^database.url: has a port that is not from 1 to 65535$"):
        open_store(DatabaseSettings(f"postgresql+asyncpg://ann@{where}"), 10)


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_database_that_cannot_keep_all_names_is_refused(postgres: Cluster, encoding: str) -> None:
    postgres.execute(f"CREATE DATABASE narrow OWNER tokenauth ENCODING '{encoding}' TEMPLATE template0")
    try:
        store = open_store(DatabaseSettings(postgres.url("narrow")), 10)
        with pytest.raises(StartError, match=f"keeps text as {encoding}; create it with ENCODING 'UTF8'"):
            await store.start()
    finally:
        postgres.drop("narrow")


def test_a_url_with_known_options_is_accepted() -> None:
    url = "postgresql+asyncpg://ann@db.example.com/tokenauth?ssl=require&prepared_statement_cache_size=50"
    assert isinstance(open_store(DatabaseSettings(url), 10).engine, PostgresEngine)
