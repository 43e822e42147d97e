"""TLS by this service itself: its certificate and its private key."""

import os
import re
import ssl
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tokenauth.errors import ConfigError
from tokenauth.settings.files_read import FilesRead, open_regular
from tokenauth.settings.model import ServerSettings

HANDSHAKE_TIMEOUT = 10.0
"""Seconds that a client has for the TLS handshake."""

SHUTDOWN_TIMEOUT = 2.0
"""Seconds to wait for the other side to end TLS, which idle clients do not do."""

_MAX_FILE = 1 << 20

_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which `ssl` has no name for."""

_CERTIFICATE = re.compile(rb"^-----BEGIN CERTIFICATE-----.+?^-----END CERTIFICATE-----", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class KeyPair:
    """The content of both files, so that workers that start later do not depend on what is in them then."""

    certificate: bytes
    key: bytes = field(repr=False)


def read(settings: ServerSettings, files: FilesRead | None = None) -> KeyPair | None:
    """Read the certificate and the key, and check that clients can connect with them. None without TLS.

    Expired certificates, and those for other names, pass: that is for clients to decide. Raises ConfigError.
    """
    if not settings.tls_certificate:
        return None
    if files is not None:
        files.note(settings.tls_certificate)
        files.note(settings.tls_key)
    pair = KeyPair(_read("server.tls_certificate", settings.tls_certificate), _read("server.tls_key", settings.tls_key))
    if b"-----BEGIN CERTIFICATE-----" not in pair.certificate:
        problem = "has no certificate in PEM form (-----BEGIN CERTIFICATE-----)"
        raise ConfigError(f"server.tls_certificate: {settings.tls_certificate} {problem}")
    if b"PRIVATE KEY-----" not in pair.key:
        raise ConfigError(f"server.tls_key: {settings.tls_key} has no private key in PEM form (PRIVATE KEY-----)")
    if b"ENCRYPTED" in pair.key:
        fix = "store it without a passphrase, readable for the service only"
        raise ConfigError(f"server.tls_key: {settings.tls_key} is encrypted; {fix}")
    what = f"{settings.tls_certificate} and {settings.tls_key}"
    try:
        context = create_context(pair)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            problem = f"{settings.tls_key} does not belong to the certificate in {settings.tls_certificate}"
            raise ConfigError(f"server.tls_key: {problem}; renew both") from None
        raise ConfigError(f"server.tls_certificate: {what} cannot be used: {_reason(error)}") from None
    except OSError as error:  # no descriptor is left
        raise ConfigError(f"server.tls_certificate: it cannot be tried: {error.strerror}") from None
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    try:
        _handshake(context, client)
    except ssl.SSLError as error:
        if error.reason == "EXCESSIVE_MESSAGE_SIZE":
            problem, fix = _too_large(settings.tls_certificate, _CERTIFICATE.findall(pair.certificate))
        else:
            problem = f"no client can connect with {what}: {_reason(error)}"
            fix = "renew both, with an RSA key or an elliptic one (P-256)"
        raise ConfigError(f"server.tls_certificate: {problem}; {fix}") from None
    return pair


def _too_large(path: str, certificates: Sequence[bytes]) -> tuple[str, str]:
    """Return what is wrong with certificates that no client accepts together, and what helps."""
    if len(b"".join(certificates[:1])) > len(b"".join(certificates[1:])):
        return f"the certificate in {path} is too large for clients", "renew it for fewer names"
    problem = f"{path} has {len(certificates):,} certificates, which is too large for clients"
    return problem, "leave only the certificate of this service and those of its issuers"


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "broken").replace("_", " ").lower()


def _read(key: str, path: str) -> bytes:
    try:
        with open_regular(path) as file:
            content = file.read(_MAX_FILE)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{key}: {path} cannot be read: {reason}") from None
    return content


def create_context(pair: KeyPair) -> ssl.SSLContext:
    """Return what a server needs: TLS 1.2 or 1.3, HTTP/1.1. Raises ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    with _as_file(pair.key + b"\n" + pair.certificate) as path:  # `ssl` takes only files
        context.load_cert_chain(path, password=b"")  # a passphrase would be asked for on the terminal
    return context


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Yield the path of a file that no other user can read: on Linux, one in memory."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tls")
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{descriptor}"
    else:
        with tempfile.NamedTemporaryFile() as temporary:
            temporary.write(content)
            temporary.flush()
            yield temporary.name


class Validity:
    """For which names and until when a certificate is valid. `problem` says why clients refuse it.

    If it could not be found out, `until` is None, and `problem` says why.
    """

    def __init__(self, pair: KeyPair) -> None:
        """Find it out. Raises nothing: a service does not depend on it."""
        self.names: tuple[str, ...] = ()
        self.until: datetime | None = None
        self.problem = ""
        try:
            self._find_out(pair)
        except (OSError, ValueError, KeyError) as error:  # ssl.SSLError is an OSError
            self.problem = str(error)

    def _find_out(self, pair: KeyPair) -> None:
        """Do a handshake in memory, in which the certificate itself is the one that is trusted."""
        server, client = create_context(pair), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
        certificates = b"\n".join(_CERTIFICATE.findall(pair.certificate))  # without comments, in whatever encoding
        client.load_verify_locations(cadata=certificates.decode("ascii"))
        try:
            found = _handshake(server, client)
        except ssl.SSLCertVerificationError as error:
            self.problem = error.verify_message
            client.verify_mode = ssl.CERT_NONE
            found = _handshake(server, client)
        self.names = tuple(str(name) for _, name in found.get("subjectAltName", ()))
        self.until = datetime.fromtimestamp(ssl.cert_time_to_seconds(found["notAfter"]), UTC)
        now = time.time()
        if now >= self.until.timestamp():
            self.problem = "certificate has expired"
        elif now < ssl.cert_time_to_seconds(found["notBefore"]):
            self.problem = "certificate is not yet valid"


def find_distrust(pair: KeyPair, client: ssl.SSLContext) -> str:
    """Return why a client with this context does not trust this certificate, whatever its names; "" if it does."""
    client.check_hostname = False
    try:
        _handshake(create_context(pair), client)
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    return ""


def _handshake(server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> dict[str, Any]:
    """Return the certificate as the client sees it. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server)
    pending = [client, server]
    while pending:
        for side in list(pending):
            try:
                side.do_handshake()
                pending.remove(side)
            except ssl.SSLWantReadError:
                continue
    client_context.verify_mode = ssl.CERT_REQUIRED  # with CERT_NONE, getpeercert() returns nothing
    return client.getpeercert() or {}
