"""Clients of tokenauth, for other services. They need the extra `client` of the distribution tokenauth-server."""

from tokenauth.client.auth import TokenAuth
from tokenauth.client.pools import AsyncLease, AsyncPoolClient, PoolClient, SyncLease
from tokenauth.client.remote import RemoteTokens

__all__ = ["AsyncLease", "AsyncPoolClient", "PoolClient", "RemoteTokens", "SyncLease", "TokenAuth"]
