"""What `tokenauth doctor` finds about a PostgreSQL database."""

from tests.support.postgres import Cluster
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import examine
from tokenauth.stores.schema import HEAD


async def test_a_database_in_use_is_well(url: str) -> None:
    report = await examine(DatabaseSettings(url))
    assert (report.problem, report.schema) == (None, HEAD)
    assert abs(report.clock_ahead) < 1


async def test_an_empty_database_stays_empty(postgres: Cluster, url: str) -> None:
    name = url.rpartition("/")[2]
    postgres.drop(name)
    postgres.create(name)
    report = await examine(DatabaseSettings(url))
    assert (report.problem, report.schema) == (None, None)
    assert postgres.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", name) == []


async def test_a_schema_with_a_capital_letter_is_read(postgres: Cluster, url: str) -> None:
    name = url.rpartition("/")[2]
    postgres.execute('CREATE SCHEMA "Auth" AUTHORIZATION tokenauth', name)
    postgres.execute('CREATE TABLE "Auth".customers (number INTEGER)', name)
    postgres.execute(f'ALTER DATABASE "{name}" SET search_path = "Auth"')
    report = await examine(DatabaseSettings(url))
    assert (report.problem, report.schema, list(report.others)) == (None, None, ["customers"])


async def test_a_read_only_database_has_a_problem(postgres: Cluster, url: str) -> None:
    name = url.rpartition("/")[2]
    postgres.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    assert "standby, or read-only" in str((await examine(DatabaseSettings(url))).problem)


async def test_a_missing_database_has_a_problem(url: str) -> None:
    report = await examine(DatabaseSettings(f"{url}_missing"))
    assert "does not exist" in str(report.problem)
