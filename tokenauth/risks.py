"""Settings that are fine on a laptop and unsafe in public."""

import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from pathlib import Path
from typing import NamedTuple, TypeVar

from tokenauth.errors import ConfigError
from tokenauth.logs import log
from tokenauth.models import User
from tokenauth.passwords import Cost, Passwords, how_to_renew
from tokenauth.settings import loader
from tokenauth.settings.dialects import PasswordDialectSettings
from tokenauth.settings.model import Settings
from tokenauth.stores.open import find_exposed_files

SHIPPED_HASH = "$argon2id$v=19$m=19456,t=2,p=1$xdhbq9U6hzAGQOhdK8V4jw$eF1njiHucmqPWL2qBLnrNU3anXn5/Tkd0tLA+QhDfSk"
"""The hash of the password in the shipped config.toml; a test compares them."""

SHIPPED_API_PASSWORD = "change-me"  # noqa: S105  (everyone knows it, which is the risk)
"""The password of a dialect in the shipped files."""


class Risk(NamedTuple):
    """Something in the configuration that helps an attacker."""

    name: str
    text: str


def find_risks(config: Settings, passwords: Passwords, path: Path | None = None) -> list[Risk]:
    """Return the risks of a configuration and of its file at `path`, whether or not others can reach the service."""
    shipped, weak = [], []
    costs = {}
    users = config.users_by_name
    for user in users.values():
        costs[user.username], is_weak = passwords.assess(user)
        if user.password_hash == SHIPPED_HASH:
            shipped.append(user.username)
        elif is_weak:
            weak.append(user.username)
    risks = []
    if shipped:
        fix = _INIT if _is_shipped(path) else _fix(users, shipped)
        text = f"{_names(shipped)} has the password that tokenauth ships with; {fix}"
        risks.append(Risk("shipped_password", text))
    if weak:
        text = f"the password hash of {_names(weak)} is cheaper to guess than [passwords] asks for; {_fix(users, weak)}"
        risks.append(Risk("weak_hash", text))
    risks += _cost_risks(passwords, users, config.server.workers, costs)
    if are_too_broad(config.server.trusted_proxies):
        text = (
            "server.trusted_proxies covers a large part of all addresses: clients there can claim any address, which"
            " defeats the throttle; list only your proxies"
        )
        risks.append(Risk("broad_trusted_proxies", text))
    if config.server.socket and int(config.server.socket_mode, 8) & stat.S_IWOTH:
        text = (
            f"server.socket_mode {config.server.socket_mode} lets all users of this machine connect: they can claim any"
            " address, which defeats the throttle; write '0660', and add the user of the proxy to the group"
        )
        risks.append(Risk("broad_trusted_proxies", text))
    secured = config.server.behind_proxy or config.server.tls_certificate
    if config.browser.url and config.browser.origin.secure and not secured:
        text = (
            "browser.url is https, so a proxy must be in front of this service, and server.trusted_proxies is empty:"
            " logins do not lead back, and the throttle takes all clients for one; list the proxy, or set"
            " server.tls_certificate if there is none"
        )
        risks.append(Risk("no_trusted_proxy", text))
    if not (config.server.loopback or secured):
        text = (
            f"server.host: clients send passwords and tokens to {config.server.host!r} over plain http, where others on"
            " the way can read them; set server.tls_certificate, or if a proxy receives https, list it in"
            " server.trusted_proxies"
        )
        risks.append(Risk("no_tls", text))
    return [*risks, *_dialect_risks(config), *_file_risks(config, path)]


def _cost_risks(
    passwords: Passwords, users: Mapping[str, User], workers: int, costs: Mapping[str, Cost]
) -> Iterator[Risk]:
    """Find hashes so costly that one client can block all logins with a few wrong passwords at the same time."""
    new = passwords.new_cost
    if new.is_slow:
        text = f"passwords: memory_kib and time_cost make each login take {new.seconds:.1f} seconds; lower one of them"
        yield Risk("costly_hash", text)
    if passwords.needs_too_much_memory(new, workers):
        text = "passwords: memory_kib, threads and server.workers can take more than half of this machine's memory"
        yield Risk("costly_hash", f"{text}; lower one of them")
    if slow := [name for name, cost in costs.items() if cost.is_slow]:
        yield Risk(
            "costly_hash", f"the password hash of {_names(slow)} takes more than a second to check; {_fix(users, slow)}"
        )
    larger = [name for name, cost in costs.items() if cost.memory_kib > new.memory_kib]
    if large := [name for name in larger if passwords.needs_too_much_memory(costs[name], workers)]:
        text = "takes more than half of this machine's memory when it is checked in all threads at once"
        yield Risk(
            "costly_hash",
            f"the password hash of {_names(large)} {text}; {_fix(users, large)}, or lower passwords.threads",
        )


def are_too_broad(proxies: Iterable[str]) -> bool:
    """Return whether networks together cover an eighth of all IPv4 addresses, or of the public IPv6 addresses."""
    networks = [ip_network(proxy) for proxy in proxies]
    four = [network for network in networks if isinstance(network, IPv4Network)]
    six = [network for network in networks if isinstance(network, IPv6Network)]
    return _has_many(four, IPv4Network("0.0.0.0/0")) or any(
        _has_many(six, IPv6Network(space)) for space in ("2000::/3", "::ffff:0:0/96")
    )


N = TypeVar("N", IPv4Network, IPv6Network)


def _has_many(networks: Sequence[N], space: N) -> bool:
    """Return whether networks cover an eighth of `space` or more: no one has that many proxies."""
    inside = [space if network.supernet_of(space) else network for network in networks if network.overlaps(space)]
    return sum(network.num_addresses for network in collapse_addresses(inside)) >= space.num_addresses // 8


def _dialect_risks(config: Settings) -> Iterator[Risk]:
    for name, dialect in config.dialects.items():
        if isinstance(dialect, PasswordDialectSettings):
            if dialect.password == SHIPPED_API_PASSWORD:
                text = f"dialects.{name}.password is the one that tokenauth ships with; set another"
                yield Risk("shipped_password", text)
        elif not dialect.require_token:
            text = f"dialects.{name} does not ask for a token; set its require_token to true"
            yield Risk("open_dialect", text)


def _file_risks(config: Settings, path: Path | None) -> Iterator[Risk]:
    """Find the files that other users of this machine can read or change."""
    other = Path(config.users_file.path) if config.users_file.path else None
    found = [one for one in (path, other) if one is not None and one.is_file()]  # not a pipe, which others cannot open
    for file in found:
        if file.stat().st_mode & stat.S_IROTH:
            fix = f"{_INIT}, which only you can read" if _is_shipped(file) else f"run `chmod o-r {file}`"
            text = f"{file} contains password hashes, and all users of this machine can read it; {fix}"
            yield Risk("readable_config", text)
    for place in dict.fromkeys(place for file in found for place in _writable(file)):
        text = f"others can write to {place}, and so add users to the configuration; run `chmod go-w {place}`"
        yield Risk("writable_config", text)
    yield from _key_risks(config.server.tls_key)
    for text in find_exposed_files(config.database):
        yield Risk("exposed_database", text)


def _key_risks(key: str) -> Iterator[Risk]:
    with suppress(OSError):  # the start says why it cannot be read
        mode = os.stat(key).st_mode if key else 0
        if mode & (stat.S_IRWXO | stat.S_IWGRP):
            text = f"server.tls_key: {key} has mode {stat.S_IMODE(mode):04o}: other users can read or change it"
            yield Risk("readable_tls_key", f"{text}; run `chmod go-w,o-rwx {key}`")


def _writable(path: Path) -> Iterator[Path]:
    """Yield what others can write to: the file, the target of its links, the directories on the way."""
    target = path.resolve()
    for place in dict.fromkeys([target, *path.absolute().parents, *target.parents]):
        found = place.stat()
        if found.st_mode & stat.S_ISVTX and place != target:  # sticky: others cannot replace files there
            continue
        if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _private(found)):
            yield place


def _private(found: os.stat_result) -> bool:
    """Return whether a file's group has its owner's name: most systems give each user such a group."""
    try:
        return grp.getgrgid(found.st_gid).gr_name == pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        return False


def check_accepted(config: Settings, risks: Sequence[Risk]) -> None:
    """Raise ConfigError if others can reach the service and a risk is not in `accept_risks`."""
    if config.exposure is None:
        return
    refused = dict.fromkeys(repr(risk.name) for risk in risks if risk.name not in config.server.accept_risks)
    if refused:
        them, fix = ("this risk is", "it") if len(refused) == 1 else ("these risks are", "them")
        raise ConfigError(
            f"{config.exposure}, and {them} not accepted: {', '.join(refused)}; fix {fix}, or list {fix} in"
            " server.accept_risks"
        )


def log_and_check(config: Settings, risks: Sequence[Risk]) -> None:
    """Log the risks. Raises ConfigError as `check_accepted` does."""
    for risk in risks:
        log.warning("configuration_risk", risk=risk.name, detail=risk.text)
    check_accepted(config, risks)


_INIT = "run `.venv/bin/tokenauth init`: it writes a configuration of your own"


def _is_shipped(path: Path | None) -> bool:
    """Return whether a file is the config.toml of a checkout in the working directory. It stays as it is shipped."""
    return path is not None and path.absolute() == loader.SHIPPED.absolute() and Path(".venv/bin/tokenauth").exists()


def _fix(users: Mapping[str, User], names: list[str]) -> str:
    return how_to_renew(users[names[0]]) + (", and so for each" if len(names) > 1 else "")


def _names(names: list[str]) -> str:
    """Return the first three names and the number of others."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} others"
