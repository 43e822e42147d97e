"""For services that leave logins to tokenauth. Needs the extra `client` of the distribution tokenauth-server."""

from tokenauth.client.auth import TokenAuth
from tokenauth.client.pools import AsyncPoolClient, PoolClient
from tokenauth.client.remote import RemoteTokens

__all__ = ["AsyncPoolClient", "PoolClient", "RemoteTokens", "TokenAuth"]
