"""`tokenauth doctor`: everything that can be checked before or while a server runs, and what to do about it."""

import asyncio
import errno
import re
import shutil
import socket
import ssl
import textwrap
import time
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn

import click

from tokenauth import file_descriptors
from tokenauth.audit import log as audit_log
from tokenauth.cli.base import count, print_json
from tokenauth.cli.health import ADDRESS_STAYS, RELOAD, ask, ask_before_reload, still_speaks
from tokenauth.errors import ConfigError
from tokenauth.logs import printable
from tokenauth.models import PUT_DATABASE_BACK, DatabaseReport
from tokenauth.passwords import Passwords
from tokenauth.risks import check_accepted, find_risks
from tokenauth.settings import loader
from tokenauth.settings.lines import find_line
from tokenauth.settings.model import AuditSettings, ServerSettings, Settings, available_cores, canonical

if TYPE_CHECKING:
    from tokenauth.server.tls import KeyPair

_LOW_DISK = 200 << 20
"""Bytes. The -wal file of a busy database can grow to 64 MiB, and more while a backup reads."""

_FULL_DISK = 4 << 20
"""Bytes. With fewer, a trial could take those that a running server needs."""

_TRIAL = 64 << 10
"""Bytes that are written to see whether that works."""

_LOW_LIMIT = 4096
"""Open files. Each connection is one."""

RENEWAL = 14 * 86400
"""Seconds before its end at which a certificate should have been renewed; the alert in docs/metrics.md has the same."""

_FREE_SPACE = 'free some space: docs/production.md, "The disk is full"'

_ANSWER_TIME = 5.0
"""Seconds for a connection to the running server."""

_SKEW = 2.0
"""Seconds by which the clocks of two machines may differ."""


Status = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """What a check has found. `fix` is what to do; `line` is in the configuration."""

    status: Status
    check: str
    text: str
    fix: str = ""
    line: int | None = None


def diagnose(config_file: str | None, as_json: bool) -> NoReturn:
    """Print what all checks find, and end with the exit status."""
    path = loader.find(config_file)
    findings = list(_examine(path))
    failed = any(finding.status == "error" for finding in findings)
    if as_json:
        print_json({"ok": not failed, "checks": [{**one._asdict(), "fix": one.fix or None} for one in findings]})
    else:
        for finding in findings:
            _show(path, finding)
        numbers = [(sum(one.status == status for one in findings), status) for status in ("error", "warning")]
        click.echo(f"{', '.join(count(number, status) for number, status in numbers)}.")
    click.get_current_context().exit(1 if failed else 0)


def _show(path: Path, finding: Finding) -> None:
    where = f"{path}, line {finding.line}: " if finding.line else ""
    width = min(shutil.get_terminal_size().columns, 120)
    fill = partial(textwrap.fill, width=width, subsequent_indent=" " * 12, break_on_hyphens=False)
    text = printable(f"{finding.check}: {where}{finding.text}")
    click.echo(fill(text, initial_indent=f"{finding.status:9}"))
    if finding.fix:
        click.echo(fill(printable(f"-> {finding.fix}"), initial_indent=" " * 9))


def _examine(path: Path) -> Iterator[Finding]:
    try:
        text = loader.read(path)
    except ConfigError as error:
        yield Finding("error", "configuration", str(error))
    else:
        settings, mistakes, missing = loader.examine(text)
        for mistake in mistakes:
            yield _finding("error", "configuration", mistake, _line(text, mistake))
        if settings is not None:
            yield from _examine_settings(path, text, settings, missing)
    yield from _examine_machine()


def _finding(status: Status, check: str, text: str, line: int | None = None) -> Finding:
    """Make a finding of a text that has the problem and, after a semicolon, what to do."""
    problem, _, fix = text.partition("; ")
    return Finding(status, check, problem, fix, line)


def _line(text: str, mistake: str) -> int | None:
    """Return the line of a mistake, which begins with the path of a key."""
    return find_line(text, mistake.partition(": ")[0])


def _examine_settings(path: Path, text: str, settings: Settings, missing: Collection[str]) -> Iterator[Finding]:
    """Examine what settings name, except where the variables of keys are missing."""
    from tokenauth.service import create_service
    from tokenauth.web.app import find_routes

    try:
        service = create_service(settings)
        find_routes(service)
    except ConfigError as error:
        yield _finding("error", "configuration", str(error), _line(text, str(error)))
        return
    users, pools = count(len(settings.users_by_name), "user"), count(len(settings.pools), "pool")
    lacking = {key.partition(".")[0].partition("[")[0] for key in missing}
    if lacking & {"users", "users_file"}:
        yield _not_examined("users")
    elif settings.users:
        found = f"{path} has {users} and {pools}"
        relative = loader.describe_relative_paths(settings)
        yield Finding("ok", "configuration", f"{found}; {relative}" if relative else found)
    else:
        yield Finding("warning", "configuration", "nobody can log in", "add a user with `tokenauth user add NAME`")
    if "server" in lacking:
        yield _not_examined("server")
    else:
        yield from _risks(path, text, settings, service.passwords)
        if settings.server.tls_certificate:
            yield _certificate(text, settings.server)
        yield (_socket if settings.server.socket else _port)(settings.server, path)
    if "database" in lacking:
        yield _not_examined("database")
    else:
        yield from _database(settings, path)
    if "audit" in lacking:
        yield _not_examined("audit log")
    else:
        yield from _audit(settings.audit)
    yield from _login(settings, service.passwords)


def _not_examined(check: str) -> Finding:
    return Finding("warning", check, "not examined", "run this with the environment of the service")


def _risks(path: Path, text: str, settings: Settings, passwords: Passwords) -> Iterator[Finding]:
    risks = find_risks(settings, passwords, path)
    try:
        check_accepted(settings, risks)
        refused = False
    except ConfigError:
        refused = True
    for risk in risks:
        accepted = risk.name in settings.server.accept_risks
        status: Status = "error" if refused and not accepted else "warning"
        yield _finding(status, f"risk {risk.name}", risk.text, _risk_line(text, settings, risk.text))
    if settings.exposure is not None:
        yield Finding("ok", "exposure", settings.exposure)
    else:
        fix = "if a reverse proxy passes requests on to it, set server.trusted_proxies"
        yield Finding("ok", "exposure", "only this machine can reach the service", fix)
    if settings.metrics.exposure is not None:
        fix = "listen on a loopback address, or on one that only Prometheus can reach"
        yield Finding("ok", "exposure", settings.metrics.exposure, fix)


def _risk_line(text: str, settings: Settings, risk: str) -> int | None:
    """Return the line of the user or of the key that the text of a risk names first."""
    if key := re.match(r"(server|browser|dialects|passwords)\b[\w.-]*", risk):
        return find_line(text, key[0])
    for number, user in enumerate(settings.users):
        if repr(canonical(user.username)) == next(iter(re.findall(r"'[^']*'", risk)), None):
            return find_line(text, f"users[{number}].password")
    return None


def _port(settings: ServerSettings, path: Path) -> Finding:
    """Look whether the address can be listened on, and who does."""
    from tokenauth.errors import StartError
    from tokenauth.server.listener import check_address, listen

    where = f"{settings.host} port {settings.port}"
    try:
        check_address(settings)
        listen(settings).close()
    except (ConfigError, StartError) as error:
        if settings.port and _is_tokenauth(settings):
            return _running("port", f"tokenauth serves on {where}", settings, path)
        if settings.port and ask_before_reload(settings, "/").get("service") == "tokenauth":
            text = f"tokenauth serves on {where}, and {still_speaks(settings)}"
            return _of_another("port", text, path) or Finding("warning", "port", text, RELOAD)
        return _finding("error", "port", str(error))
    return _free("port", where, path)


def _certificate(text: str, settings: ServerSettings) -> Finding:
    """Look whether the certificate and the key can be used, for which names and until when."""
    from tokenauth.server import tls

    try:
        pair = tls.read(settings)
        assert pair is not None
    except ConfigError as error:
        return _finding("error", "certificate", str(error), _line(text, str(error)))
    found, line, fix = tls.Validity(pair), find_line(text, "server.tls_certificate"), tls.RENEW
    if found.until is None:
        return Finding("warning", "certificate", f"its names and its end cannot be read: {found.problem}", line=line)
    if found.refused:
        return Finding("error", "certificate", f"clients refuse it: {found.problem}", fix, line)
    names = f"it is for {', '.join(found.names) or 'no name'}, until {found.until:%Y-%m-%d %H:%M} UTC"
    served = _served_until(settings) if not settings.socket and _is_tokenauth(settings) else None
    if served is not None and served != found.until:
        text = f"{names}, but the server still serves another one, until {served:%Y-%m-%d %H:%M} UTC"
        return Finding("warning", "certificate", text, "reload", line)
    if found.until.timestamp() - time.time() < RENEWAL:
        return Finding("warning", "certificate", names, fix, line)
    distrust = _find_distrust(pair)
    text = f"{names}; {distrust}" if distrust else names
    fix = 'clients need the certificate of its issuer: docs/clients.md, "A certificate of your own issuer"'
    return Finding("ok", "certificate", text, fix if distrust else "")


def _find_distrust(pair: "KeyPair") -> str:
    """Say why clients in this environment do not trust the certificate; "" if they do."""
    from tokenauth.server import tls

    try:
        try:
            from tokenauth.client.issuer import create_ssl_context
        except ModuleNotFoundError:  # httpx is an extra
            who, context = "programs that trust OpenSSL's issuers", ssl.create_default_context()
        else:
            who, context = "`tokenauth run` and the Python clients", create_ssl_context()
        reason = tls.find_distrust(pair, context)
    except OSError as error:
        return f"whether clients trust it cannot be found out: {error.strerror or error}"
    return f"{who} do not trust it here: {reason}" if reason else ""


def _served_until(settings: ServerSettings) -> datetime | None:
    """Return the end of the certificate that is served at the address; None if none is, or it cannot be read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    address = (settings.reachable_host, settings.port)
    try:
        with (
            socket.create_connection(address, _ANSWER_TIME) as connection,
            context.wrap_socket(connection) as served,
        ):
            context.verify_mode = ssl.CERT_REQUIRED  # with CERT_NONE, getpeercert() returns nothing
            found = served.getpeercert() or {}
            return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(found["notAfter"])), UTC)
    except (OSError, ValueError, KeyError):
        return None


def _socket(settings: ServerSettings, path: Path) -> Finding:
    """Look whether the Unix socket can be listened on, and who does."""
    from tokenauth.errors import StartError
    from tokenauth.server import unix_socket

    try:
        unix_socket.check(settings.socket)
        served = unix_socket.is_served(settings.socket)
    except (ConfigError, StartError) as error:
        return _finding("error", "socket", str(error))
    if not served:
        return _free("socket", settings.socket, path)
    if _is_tokenauth(settings):
        return _running("socket", f"tokenauth serves on {settings.socket}", settings, path)
    return Finding("error", "socket", f"another program serves on {settings.socket}", "stop it, or use another path")


def _free(check: str, where: str, path: Path) -> Finding:
    """Say that nothing serves at the address; a warning if a server of this configuration runs."""
    from tokenauth.server.control import find_servers

    servers = find_servers(path)
    if not servers:
        return Finding("ok", check, f"{where} is free")
    text = f"{where} is free, and process {servers[0]}, which serves this configuration, has another address"
    return Finding("warning", check, text, f"restart it if the address was changed: {ADDRESS_STAYS}")


def _of_another(check: str, text: str, path: Path) -> Finding | None:
    """Say so if the server at the address uses another configuration file than this one."""
    from tokenauth.server.control import AVAILABLE, describe_others, find_servers

    if not AVAILABLE or find_servers(path):
        return None
    others = describe_others(path)
    fix = "restart it with this file, or name its own file with --config"
    return Finding("warning", check, f"{text}, but not with {path}{others and f': {others}'}", fix)


def _running(check: str, text: str, settings: ServerSettings, path: Path) -> Finding:
    """Ask the running server whether it is ready: what keeps it from that may not show from here."""
    other = _of_another(check, text, path)
    if other is not None:
        return other
    problem = ask(settings, "/readyz").get("reason")
    if problem is None:
        return Finding("ok", check, text)
    return Finding("error", check, f"{text}, and is not ready: {problem}", _runbook(problem, "When something happens"))


def _is_tokenauth(settings: ServerSettings) -> bool:
    return ask(settings, "/").get("service") == "tokenauth"


def _audit(settings: AuditSettings) -> Iterator[Finding]:
    problem = audit_log.find_problem(settings)
    if problem is not None:
        yield _finding("warning", "audit log", problem)
    elif settings.file:
        yield Finding("ok", "audit log", f"{settings.file} is writable")


def _database(settings: Settings, path: Path) -> Iterator[Finding]:
    from tokenauth.stores.open import check_files, examine

    try:
        check_files(settings.database)
        report = asyncio.run(examine(settings.database))
    except ConfigError as error:
        yield _finding("error", "database", str(error))
        return
    disk = _disk(Path(report.name).parent) if settings.database.url.startswith("sqlite") else None
    full = disk is not None and disk.status == "error"
    yield _schema(report, full, disk is not None) if report.exists else _missing(report, settings.server, path)
    if report.network is not None:
        text = f"{report.name} is on {report.network}, a file system of another machine"
        yield Finding("error", "database", text, "move it to a local disk: SQLite's locks are not reliable there")
    if disk is not None:
        yield disk
    yield _clock(report)


def _disk(directory: Path) -> Finding:
    """Look for room on the disk of the database. What quotas allow, and if the disk works, only a write shows."""
    free = shutil.disk_usage(directory).free
    space = f"{free / (1 << 30):,.1f} GiB" if free >= 1 << 30 else f"{free / (1 << 20):,.1f} MiB"
    text, fix = f"{space} are free for the database", _FREE_SPACE
    if free < _FULL_DISK:
        return Finding("error", "disk", text, fix)
    try:
        with TemporaryFile(dir=directory) as file:
            file.write(bytes(_TRIAL))
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS}:  # a running server needs no new files
            return Finding("error", "disk", f"{text}, but none can be written: {error.strerror}", fix)
    low = free < _LOW_DISK
    return Finding("warning" if low else "ok", "disk", text, fix if low else "")


_SECTIONS = {
    "database is locked": "The database is locked",
    "no host is the primary": "No host is the primary",
    "commits wait for": "Commits wait for a standby",
    "the database file is missing": "The database file is gone or was replaced",
    "was moved, deleted or replaced": "The database file is gone or was replaced",
    "the database file was replaced": "The database file is gone or was replaced",
    "disk is full": "The disk is full",
    "password authentication failed": "A secret changes",
    "attempt to write a readonly database": "A file has the wrong mode",
}
"""What a problem has in its text, and the section of the document for it. No path has such words by chance."""


def _runbook(problem: str, otherwise: str) -> str:
    """Name the section of the document that is about a problem of the database."""
    section = next((section for words, section in _SECTIONS.items() if words in problem), otherwise)
    return f'docs/production.md, "{section}"'


def _missing(report: DatabaseReport, server: ServerSettings, path: Path) -> Finding:
    """Tell a database that is not there yet from one that a server has used and that was moved."""
    from tokenauth.server.control import AVAILABLE, find_servers

    # The server at the address may be of another configuration, and use another database.
    if find_servers(path) if AVAILABLE else _is_tokenauth(server):
        fix = f'{PUT_DATABASE_BACK}: docs/production.md, "The database file is gone or was replaced"'
        return Finding("error", "database", f"{report.name} is missing while a server uses it", fix)
    if report.problem is not None:
        return _finding("error", "database", report.problem)
    return Finding("ok", "database", f"{report.name} does not exist yet; `serve` creates it")


def _schema(report: DatabaseReport, full: bool, sqlite: bool) -> Finding:
    from tokenauth.stores import schema

    if report.problem is not None:
        fix = _runbook(report.problem, "Backup" if sqlite else "The database restarts")
        return Finding("error", "database", f"{report.name}: {report.problem}", fix)
    if report.schema is None:
        return _without_tables(report)
    if schema.serves(report.schema):
        usable = "readable, but not writable" if full else "readable and writable"
        text = f"{report.name} is {usable}, with schema {report.schema}"
        return Finding("error" if full else "ok", "database", text, _FREE_SPACE if full else "")
    if report.schema == schema.COPYING:
        return Finding("error", "database", f"{report.name} is {schema.UNFINISHED_COPY}", schema.FINISH_COPY)
    text = f"{report.name} has schema {report.schema}; this release needs {schema.HEAD}"
    if schema.is_newer(report.schema):
        return Finding("error", "database", text, "install the newer release that has upgraded it, or restore a backup")
    return Finding("warning", "database", text, f"back it up; `serve` and `migrate` upgrade it. {schema.STOP_FIRST}")


def _without_tables(report: DatabaseReport) -> Finding:
    from tokenauth.stores import schema

    if taken := schema.taken_names(report.others):
        text = f"{report.name} has tables of another program, {taken}, whose names tokenauth uses"
        return Finding("error", "database", text, schema.OWN_DATABASE)
    text = f"{report.name} has no tables of tokenauth; `serve` makes them"
    if report.others:
        more = f"{text}, beside {count(len(report.others), 'table')} of another program"
        return Finding("warning", "database", more, f"{schema.OWN_DATABASE}, unless both are meant to share this one")
    return Finding("ok", "database", text)


def _clock(report: DatabaseReport) -> Finding:
    now = time.time()
    if report.written_at is not None and report.written_at > now + report.clock_ahead + _SKEW:
        seconds = round(report.written_at - now)
        text = f"it is {seconds} s behind the latest time in the database, which is used until the clock catches up"
        fix = "correct the clock, for example with NTP; if it is right now, it was ahead before, and you can only wait"
        return Finding("error", "clock", text, fix)
    if abs(report.clock_ahead) > _SKEW:
        text = f"that of the database's machine differs by {report.clock_ahead:+.0f} s"
        return Finding("warning", "clock", text, "run NTP on both")
    if now < Path(__file__).stat().st_mtime - 86400:
        return Finding("error", "clock", "it is earlier than this installation", "correct it, for example with NTP")
    return Finding("ok", "clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))


def _login(settings: Settings, passwords: Passwords) -> Iterator[Finding]:
    """Measure what a login costs, with the settings for new hashes."""
    seconds = min(_seconds_to_hash(passwords) for _ in range(3))
    threads = settings.passwords.thread_count * settings.server.workers
    cores = min(available_cores(), threads)
    memory = settings.passwords.memory_kib / 1024
    text = (
        f"a password takes {seconds * 1000:.0f} ms of a core and {memory:.0f} MiB to check: about"
        f" {cores / seconds:,.0f} logins a second on {count(cores, 'core')}"
    )
    slow = seconds > 1
    yield Finding("warning" if slow else "ok", "login", text, "lower passwords.memory_kib or time_cost" if slow else "")


def _seconds_to_hash(passwords: Passwords) -> float:
    started = time.perf_counter()
    passwords.hash("a password to measure")
    return time.perf_counter() - started


def _examine_machine() -> Iterator[Finding]:
    from tokenauth.server.versions import KNOWN_UVICORN, uvicorn_version

    file_descriptors.raise_limit()
    limit = file_descriptors.limit()
    low = limit < _LOW_LIMIT
    fix = "raise it: LimitNOFILE=65536 in systemd" if low else ""
    text = f"{limit:,} are allowed, so each worker keeps at most {limit - file_descriptors.reserve():,} connections"
    yield Finding("warning" if low else "ok", "open files", text, fix)
    version = uvicorn_version()
    if version.startswith(KNOWN_UVICORN):
        yield Finding("ok", "uvicorn", f"{version} is a release that this one was tested with")
    else:
        fix = "install the packages of requirements-serve.lock"
        yield Finding("error", "uvicorn", f"{version} was not tested: tokenauth uses its private names", fix)
