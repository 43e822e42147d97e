"""What a service needs that leaves logins to tokenauth: `pip install 'tokenauth[client]'`."""

from tokenauth.client.auth import TokenAuth
from tokenauth.client.pools import AsyncPoolClient, PoolClient
from tokenauth.client.remote import RemoteTokens

__all__ = ["AsyncPoolClient", "PoolClient", "RemoteTokens", "TokenAuth"]
