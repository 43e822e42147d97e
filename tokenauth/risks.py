"""What is fine on a laptop and wrong in public."""

from collections.abc import Iterator
from typing import NamedTuple

from tokenauth.config import Config
from tokenauth.errors import ConfigError
from tokenauth.lending import PasswordDialect
from tokenauth.logs import log
from tokenauth.passwords import Passwords

SHIPPED_HASH = "$argon2id$v=19$m=19456,t=2,p=1$xdhbq9U6hzAGQOhdK8V4jw$eF1njiHucmqPWL2qBLnrNU3anXn5/Tkd0tLA+QhDfSk"
"""The hash of the password that config.toml is shipped with; a test holds the two together."""

SHIPPED_API_PASSWORD = "change-me"  # noqa: S105  (known to everybody, which is the point)
"""The password of simple-token-implement that config.toml is shipped with."""


class Risk(NamedTuple):
    """Something that the configuration allows and an attacker would like."""

    name: str
    text: str


def find_risks(config: Config, passwords: Passwords) -> list[Risk]:
    """List what is risky about a configuration, whoever can reach the service."""
    shipped, weak = [], []
    for user in config.directory.values():
        if user.password_hash == SHIPPED_HASH:
            shipped.append(user.username)
        elif passwords.weak(user):
            weak.append(user.username)
    risks = []
    mend = "run `tokenauth user passwd NAME`"
    if shipped:
        risks.append(
            Risk("shipped_password", f"{_some(shipped)} has the password that tokenauth is shipped with; {mend}")
        )
    if weak:
        text = f"the password hash of {_some(weak)} costs an attacker less than [passwords] asks for; {mend}"
        risks.append(Risk("weak_hash", text))
    for proxy in config.server.trusted_proxies:
        if proxy.endswith("/0"):
            text = (
                f"server.trusted_proxies has {proxy!r}: anybody may claim any client address, which undoes the throttle"
            )
            risks.append(Risk("trusts_everybody", text))
    return [*risks, *_of_dialects(config)]


def _of_dialects(config: Config) -> Iterator[Risk]:
    for name, dialect in config.dialects.chosen().items():
        if isinstance(dialect, PasswordDialect):
            if dialect.password == SHIPPED_API_PASSWORD:
                text = f"dialects.{name}.password is the one that tokenauth is shipped with; set another"
                yield Risk("shipped_password", text)
        elif not dialect.require_token:
            text = f"dialects.{name} asks nobody for a token; set its require_token to true"
            yield Risk("open_dialect", text)


def demand_acceptable(config: Config, risks: list[Risk]) -> None:
    """Raise ConfigError when the service may not start: others can reach it, and a risk has not been accepted."""
    for risk in risks:
        if not config.server.loopback and risk.name not in config.server.accept_risks:
            reach = f"server.host: {config.server.host!r} can be reached by others"
            raise ConfigError(f"{reach}, and {risk.text} (or add {risk.name!r} to server.accept_risks)")


def judge(config: Config, risks: list[Risk]) -> None:
    """Log the risks. Raises ConfigError for one that is not acceptable."""
    for risk in risks:
        log.warning("configuration_risk", risk=risk.name, detail=risk.text)
    demand_acceptable(config, risks)


def _some(names: list[str]) -> str:
    """Name a few, and count the others."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} others"
