"""The configuration that `tokenauth init` writes."""

import re
import tomllib
from collections.abc import Mapping
from typing import Any

import tomlkit

from tokenauth.errors import ConfigError
from tokenauth.settings import loader
from tokenauth.settings.user_editor import with_user

_SETTINGS = """\
# The configuration of tokenauth. docs/configuration.md explains all settings; what is not here has a default.
# `tokenauth check` looks for mistakes and risks. After a change: `tokenauth reload`.

[server]
host = "127.0.0.1"      # only this machine can reach it; "0.0.0.0": everyone
port = 8000
cors_origins = []       # origins whose web pages may call, such as "https://app.example.com"
trusted_proxies = []    # reverse proxies in front of it, such as "127.0.0.1"

[database]
url = "sqlite+aiosqlite:///tokenauth.db"   # three slashes: relative to the working directory; four: absolute

[tokens]
ttl = "24h"             # lifetime of a login

# A login page for people, for all hosts of a domain: docs/browser-login.md
# [browser]
# url = "https://auth.example.com"
# domain = "example.com"
# return_to = ["https://*.example.com"]

# Tokens to lease, to limit how many clients use something at once: docs/pools.md
# [pools.licences]
# capacity = 3
# prefill = true
# lease_ttl = "60s"

"""

_USERS = """
# Users: `tokenauth user add NAME`, `tokenauth user passwd NAME`.
"""

_NAME = re.compile(r"([a-z_]+)\.([a-z_]+)=(.*)", re.DOTALL)


def starter(entry: Mapping[str, Any], settings: list[str]) -> str:
    """Return a small configuration with one user, and with settings such as 'server.port=8001'. Raises ConfigError.

    The value is TOML, or else taken as text.
    """
    document = tomlkit.parse(_SETTINGS)
    for setting in settings:
        found = _NAME.fullmatch(setting)
        if found is None:
            raise ConfigError(f"--set {setting!r}: must have the form TABLE.KEY=VALUE, such as 'server.port=8001'")
        table, key, value = found.groups()
        document.setdefault(table, tomlkit.table())[key] = _parse(value)
    text = with_user(tomlkit.dumps(document).rstrip("\n") + "\n" + _USERS, dict(entry))
    loader.parse(text)
    return text


def _parse(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
