"""What `serve` says on a terminal when it is ready. Elsewhere it logs events."""

from collections.abc import Iterator, Sequence

from tokenauth import __version__
from tokenauth.risks import SHIPPED_HASH, Risk
from tokenauth.settings.model import Settings


def greeting(settings: Settings, port: int, risks: Sequence[Risk], command: str, options: str) -> str:
    """Return the text, with line breaks. `command` and `options` are how a person runs other commands."""
    lines = [f"tokenauth {__version__} is ready.", "", *_addresses(settings, port), "", *_users(settings, command)]
    if risks:
        what = "setting is" if len(risks) == 1 else "settings are"
        lines.append(f"{len(risks)} {what} unsafe on a public address: {command} check{options}")
    lines.append(f"After a change of the configuration: {command} reload{options}")
    return "\n".join(["", *lines, "Ctrl-C stops.", "", ""])


def _addresses(settings: Settings, port: int) -> Iterator[str]:
    host, found = settings.server.host, list[tuple[str, str]]()
    everywhere = host != settings.server.reachable_host
    shown = "localhost" if everywhere else f"[{host}]" if ":" in host else host
    url = f"{'https' if settings.server.tls_certificate else 'http'}://{shown}:{port}"
    if settings.server.socket:
        found.append((f"unix:{settings.server.socket}", "for a reverse proxy"))
    else:
        found.append((url, "and all other addresses of this machine" if everywhere else ""))
        found.append((f"{url}/console", "see logins, named tokens and pools"))
    if settings.server.docs and not settings.server.socket:
        found.append((f"{url}/docs", "try the API"))
    if settings.browser.url:
        found.append((f"{settings.browser.origin}/login", "login page"))
    if settings.metrics.listen:
        found.append((f"http://{settings.metrics.listen}/metrics", "metrics for Prometheus"))
    width = max(len(address) for address, _ in found)
    for address, what in found:
        yield f"  {address:{width}}  {what}".rstrip()


def _users(settings: Settings, command: str) -> Iterator[str]:
    users = settings.users_by_name.values()
    if not users:
        yield f"Nobody can log in yet. Write a configuration with a user: {command} init"
    elif any((user.username, user.password_hash) == ("admin", SHIPPED_HASH) for user in users):
        yield "Log in as admin / admin."
