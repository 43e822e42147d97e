"""Configurations whose documents are tested."""

API_PASSWORD = "open-sesame"

POOLS = """
[pools.permits]
capacity = 3
prefill = true

[pools.uuids]
capacity = 1000000
manage_scope = "read"

[pools.random]
manage_scope = "read"

[pools.owned]
manage_scope = "read"

[pools.small]
capacity = 1
manage_scope = "read"

[pools.phones]
lease_max = "8h"
per_user = 1
[[pools.phones.members]]
name = "pixel-8"
labels = ["android", "arm"]
[[pools.phones.members]]
name = "moto"

[pools.tablets]
manage_scope = "read"
[[pools.tablets.members]]
name = "tab"

# with the password bob-secret
[[users]]
username = "eve"
password = "$argon2id$v=19$m=8,t=1,p=1$LIVwzhljLKW0tvbeW2tNqQ$9JC3XMtZhQy2Oi5GB4ktwLx5ktUmIdEa8FXN6h6E8S4"
scopes = ["read"]

[pools.restricted]
scope = "write"
manage_scope = "write"
"""

_DIALECTS = {
    "simple-token-implement": f'pool = "permits"\npassword = "{API_PASSWORD}"',
    "token-pool": 'pool = "uuids"',
    "random-token-generator": 'pool = "random"',
    "token-management-service": 'pool = "owned"',
}


def with_dialects(more: str = "", pools: str = POOLS, **prefixes: str) -> str:
    """Return pools and the tables of the dialects with a prefix. `more` is added to each table."""
    chosen = {name.replace("_", "-"): prefix for name, prefix in prefixes.items()}
    tables = (f'[dialects.{name}]\n{_DIALECTS[name]}\nprefix = "{prefix}"\n{more}\n' for name, prefix in chosen.items())
    return pools + "\n".join(tables)


ALL_DIALECTS = {
    "simple_token_implement": "/simple",
    "token_pool": "/pool",
    "random_token_generator": "/random",
    "token_management_service": "/managed",
}
"""All dialects, each with its own prefix."""
