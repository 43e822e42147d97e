"""What differs between two configurations, as names: of values only scopes, since all others may be secrets."""

from collections.abc import Iterable, Mapping, Sequence

from tokenauth.models import User
from tokenauth.settings.fields import Table
from tokenauth.settings.model import Settings

_MAX_NAMES = 50
"""Names of one kind; more are counted."""

_NAMED_ELSEWHERE = frozenset({"users", "pools"})


def find_differences(before: Settings, after: Settings) -> Mapping[str, Sequence[str]]:
    """Return what was added, removed and changed: the names of users, pools and settings. Leave out what is empty.

    Scopes are shown as "ann: read -> read admin".
    """
    old, new = before.users_by_name, after.users_by_name
    both = [(name, old[name], new[name]) for name in old if name in new]
    found = {
        "users_added": [name for name in new if name not in old],
        "users_removed": [name for name in old if name not in new],
        "passwords_changed": [name for name, one, other in both if one.password_hash != other.password_hash],
        "scopes_changed": [
            f"{name}: {_scopes(one)} -> {_scopes(other)}" for name, one, other in both if one.scopes != other.scopes
        ],
        "pools_added": [name for name in after.pools if name not in before.pools],
        "pools_removed": [name for name in before.pools if name not in after.pools],
        "pools_changed": [
            name for name, pool in before.pools.items() if name in after.pools and after.pools[name] != pool
        ],
        "settings_changed": list(_changed(before, after, "", _NAMED_ELSEWHERE)),
    }
    return {kind: _bounded(names) for kind, names in found.items() if names}


def _scopes(user: User) -> str:
    return " ".join(user.scopes) or "none"


def _changed(before: object, after: object, path: str, left_out: frozenset[str] = frozenset()) -> Iterable[str]:
    """Yield the paths of settings that differ, such as "tokens.ttl"."""
    if before == after:
        return
    if isinstance(before, Table) and type(before) is type(after):
        keys = [key for key in type(before).__struct_fields__ if key not in left_out]
        pairs = {key: (getattr(before, key), getattr(after, key)) for key in keys}
    elif isinstance(before, dict) and isinstance(after, dict):
        pairs = {
            key: (before.get(key), after.get(key)) for key in (*before, *(key for key in after if key not in before))
        }
    else:
        yield path
        return
    for key, (one, other) in pairs.items():
        yield from _changed(one, other, f"{path}.{key}".lstrip("."))


def _bounded(names: Sequence[str]) -> Sequence[str]:
    rest = len(names) - _MAX_NAMES
    return names if rest <= 0 else [*names[:_MAX_NAMES], f"and {rest} more"]
