"""What is said where a package of an extra is missing."""

import sys

import pytest

from tokenauth.errors import ConfigError
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store


def forget(monkeypatch: pytest.MonkeyPatch, package: str, *importers: str) -> None:
    """Make a package impossible to import, and let those that have imported it do so again."""
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(importers)]:
        monkeypatch.delitem(sys.modules, name)


def test_without_httpx_the_clients_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, "httpx", "tokenauth.client")
    with pytest.raises(ModuleNotFoundError, match="install the extra `client` of tokenauth-server"):
        __import__("tokenauth.client")


def test_without_asyncpg_postgresql_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, "asyncpg", "tokenauth.stores.postgres")
    with pytest.raises(ConfigError, match=r"^database\.url: PostgreSQL needs asyncpg: install the extra `postgres`"):
        open_store(DatabaseSettings("postgresql+asyncpg://user@host/database"), 1)
