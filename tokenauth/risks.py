"""What is fine on a laptop and wrong in public."""

import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from pathlib import Path
from typing import NamedTuple, TypeVar

from tokenauth.errors import ConfigError
from tokenauth.logs import log
from tokenauth.passwords import Cost, Passwords
from tokenauth.settings.dialects import PasswordDialectSettings
from tokenauth.settings.model import Settings
from tokenauth.stores.sqlite.files import exposed

SHIPPED_HASH = "$argon2id$v=19$m=19456,t=2,p=1$xdhbq9U6hzAGQOhdK8V4jw$eF1njiHucmqPWL2qBLnrNU3anXn5/Tkd0tLA+QhDfSk"
"""The hash of the password that config.toml is shipped with; a test holds the two together."""

SHIPPED_API_PASSWORD = "change-me"  # noqa: S105  (known to everybody, which is the point)
"""The password of simple-token-implement that config.toml is shipped with."""


class Risk(NamedTuple):
    """Something that the configuration allows and an attacker would like."""

    name: str
    text: str


def find_risks(config: Settings, passwords: Passwords, path: Path | None = None) -> list[Risk]:
    """List what is risky about a configuration, and about its file at `path`, whoever can reach the service."""
    shipped, weak = [], []
    costs = {}
    for user in config.users_by_name.values():
        costs[user.username] = passwords.cost(user)
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
    risks += _of_costs(passwords, config.server.workers, costs)
    if trusts_everybody(config.server.trusted_proxies):
        text = (
            "server.trusted_proxies has a large part of all addresses: clients in it may claim any address,"
            " which undoes the throttle; name your proxies only"
        )
        risks.append(Risk("trusts_everybody", text))
    return [*risks, *_of_dialects(config), *_of_files(config, path)]


def _of_costs(passwords: Passwords, workers: int, costs: Mapping[str, Cost]) -> Iterator[Risk]:
    """Find what lets one client stop the logins of all, with a few wrong passwords at the same time."""
    new = passwords.new_cost
    if passwords.slow(new):
        text = f"passwords: memory_kib and time_cost make each login take about {new.seconds:.1f} seconds; lower them"
        yield Risk("costly_hash", text)
    if passwords.crowds(new, workers):
        text = "passwords: memory_kib, threads and server.workers can take more than half of this machine's memory"
        yield Risk("costly_hash", f"{text}; lower one of them")
    mend = "run `tokenauth user passwd NAME`"
    if slow := [name for name, cost in costs.items() if passwords.slow(cost)]:
        yield Risk("costly_hash", f"the password hash of {_some(slow)} takes more than a second to check; {mend}")
    larger = [name for name, cost in costs.items() if cost.memory_kib > new.memory_kib]
    if large := [name for name in larger if passwords.crowds(costs[name], workers)]:
        text = "takes more than half of this machine's memory, as often as it can be checked at once"
        yield Risk("costly_hash", f"the password hash of {_some(large)} {text}; {mend}, or lower passwords.threads")


def trusts_everybody(proxies: Iterable[str]) -> bool:
    """Whether networks have, together, an eighth of all IPv4 addresses, or of the IPv6 addresses in public use."""
    networks = [ip_network(proxy) for proxy in proxies]
    four = [network for network in networks if isinstance(network, IPv4Network)]
    six = [network for network in networks if isinstance(network, IPv6Network)]
    return _has_many(four, IPv4Network("0.0.0.0/0")) or any(
        _has_many(six, IPv6Network(space)) for space in ("2000::/3", "::ffff:0:0/96")
    )


N = TypeVar("N", IPv4Network, IPv6Network)


def _has_many(networks: Sequence[N], space: N) -> bool:
    """Whether networks have an eighth of the addresses of another, or more: no proxies are so many."""
    inside = [space if network.supernet_of(space) else network for network in networks if network.overlaps(space)]
    return sum(network.num_addresses for network in collapse_addresses(inside)) >= space.num_addresses // 8


def _of_dialects(config: Settings) -> Iterator[Risk]:
    for name, dialect in config.dialects.items():
        if isinstance(dialect, PasswordDialectSettings):
            if dialect.password == SHIPPED_API_PASSWORD:
                text = f"dialects.{name}.password is the one that tokenauth is shipped with; set another"
                yield Risk("shipped_password", text)
        elif not dialect.require_token:
            text = f"dialects.{name} asks nobody for a token; set its require_token to true"
            yield Risk("open_dialect", text)


def _of_files(config: Settings, path: Path | None) -> Iterator[Risk]:
    """Find the files that other users of this machine can read or change."""
    if path is not None and path.is_file():  # what comes through a pipe is nobody's to read
        if path.stat().st_mode & stat.S_IROTH:
            text = f"{path} has the password hashes, and every user of this machine can read it; run `chmod o-r {path}`"
            yield Risk("readable_config", text)
        for changeable in _changeable(path):
            text = f"others can change {changeable}, and so who may log in; run `chmod go-w {changeable}`"
            yield Risk("writable_config", text)
    for text in exposed(config.database.url):
        yield Risk("exposed_database", text)


def _changeable(path: Path) -> Iterator[Path]:
    """List what somebody else can write of a file, what it is a link to, and the directories that lead there."""
    target = path.resolve()
    for place in dict.fromkeys([target, *path.absolute().parents, *target.parents]):
        found = place.stat()
        if found.st_mode & stat.S_ISVTX and place != target:  # in such a directory nobody replaces what is another's
            continue
        if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _private(found)):
            yield place


def _private(found: os.stat_result) -> bool:
    """Whether the group of a file is its owner's own, as most systems give each user one of the same name."""
    try:
        return grp.getgrgid(found.st_gid).gr_name == pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        return False


def demand_acceptable(config: Settings, risks: list[Risk]) -> None:
    """Raise ConfigError when the service may not start: others can reach it, and risks have not been accepted."""
    if config.exposure is None:
        return
    refused = dict.fromkeys(repr(risk.name) for risk in risks if risk.name not in config.server.accept_risks)
    if refused:
        them, fix = ("this risk is", "it") if len(refused) == 1 else ("these risks are", "them")
        raise ConfigError(
            f"{config.exposure}, and {them} not accepted: {', '.join(refused)}; fix {fix}, or name {fix} in"
            " server.accept_risks"
        )


def judge(config: Settings, risks: list[Risk]) -> None:
    """Log the risks. Raises ConfigError for one that is not acceptable."""
    for risk in risks:
        log.warning("configuration_risk", risk=risk.name, detail=risk.text)
    demand_acceptable(config, risks)


def _some(names: list[str]) -> str:
    """Name a few, and count the others."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} others"
