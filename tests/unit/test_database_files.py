"""The database's files: new ones are private, and those that others can access are reported."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import START
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import find_exposed_files, open_store


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o377])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def database(directory: Path) -> DatabaseSettings:
    return DatabaseSettings(f"sqlite+aiosqlite:///{directory / 'tokenauth.db'}")


def modes(directory: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


async def test_new_files_are_private_under_any_umask(tmp_path: Path, umask: int) -> None:
    store = open_store(database(tmp_path), 10)
    await store.start()
    await store.save_time(START)
    found = modes(tmp_path)
    assert {"tokenauth.db", "tokenauth.db-wal", "tokenauth.db-shm"} <= set(found)
    assert set(found.values()) == {0o600}
    assert find_exposed_files(database(tmp_path)) == []
    await store.stop(START)


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal", "-lock"])
@pytest.mark.parametrize(("mode", "reports"), [(0o600, 0), (0o640, 0), (0o644, 1), (0o604, 1), (0o660, 1), (0o602, 1)])
def test_a_file_that_others_can_access_is_reported(tmp_path: Path, suffix: str, mode: int, reports: int) -> None:
    file = tmp_path / f"tokenauth.db{suffix}"
    file.touch()
    file.chmod(mode)
    found = find_exposed_files(database(tmp_path))
    assert len(found) == reports
    assert all(f"{file} has mode {mode:04o}" in text for text in found)


@pytest.mark.parametrize(("mode", "reports"), [(0o700, 0), (0o755, 0), (0o770, 0), (0o777, 1), (0o1777, 0)])
def test_a_directory_others_can_write_to_is_reported(tmp_path: Path, mode: int, reports: int) -> None:
    directory = tmp_path / "place"
    directory.mkdir()
    directory.chmod(mode)
    assert len(find_exposed_files(database(directory))) == reports


@pytest.mark.parametrize("other", ["postgresql+asyncpg://ann@db/tokenauth", "sqlite+aiosqlite:///:memory:", "nonsense"])
def test_a_database_without_a_file_exposes_none(other: str) -> None:
    assert find_exposed_files(DatabaseSettings(other)) == []
