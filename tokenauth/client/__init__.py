"""Clients of tokenauth, for other services. They need the extra `client` of the distribution tokenauth-server."""

try:
    import httpx  # noqa: F401  (for the error)
except ModuleNotFoundError as error:
    if error.name != "httpx":
        raise
    text = "tokenauth.client needs httpx: install the extra `client` of tokenauth-server."
    raise ModuleNotFoundError(text, name="httpx") from None

from tokenauth.client.auth import TokenAuth
from tokenauth.client.pools import AsyncLease, AsyncPoolClient, PoolClient, SyncLease
from tokenauth.client.remote_tokens import RemoteTokens

__all__ = ["AsyncLease", "AsyncPoolClient", "PoolClient", "RemoteTokens", "SyncLease", "TokenAuth"]
