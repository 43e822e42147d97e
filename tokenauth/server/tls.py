"""TLS by this service itself: its certificate and its private key."""

import codecs
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
from tokenauth.settings.files_read import FilesRead, read_file
from tokenauth.settings.model import ServerSettings

HANDSHAKE_TIMEOUT = 10.0
"""Seconds that a client has for the TLS handshake."""

_MAX_FILE = 1 << 20

_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which `ssl` has no name for."""

_CERTIFICATE = re.compile(rb"^-----BEGIN CERTIFICATE-----.+?^-----END CERTIFICATE-----", re.MULTILINE | re.DOTALL)
_PRIVATE_KEY = re.compile(
    rb"^-----BEGIN [A-Z ]*PRIVATE KEY-----.+?^-----END [A-Z ]*PRIVATE KEY-----", re.MULTILINE | re.DOTALL
)

_MISMATCHES = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}
"""What OpenSSL says of a key that belongs to another certificate. The last one: of another kind."""

RENEW = "renew it, then reload"
"""What to do about a certificate that clients refuse, or will refuse soon."""

_RESTORE = "copy the whole file again, or renew certificate and key"
_RENEW = "renew both, with an RSA key of at least 2,048 bits or an elliptic one (P-256)"


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
    certificate, key = os.path.abspath(settings.tls_certificate), os.path.abspath(settings.tls_key)
    if files is not None:
        files.note(certificate)
        files.note(key)
    pair = KeyPair(_read_certificates(certificate), _read_key(key))
    try:
        context = create_context(pair)
    except ssl.SSLError as error:
        raise ConfigError(_why_unusable(error, certificate, key)) from None
    except OSError as error:  # no descriptor is left
        raise ConfigError(f"server.tls_certificate: it cannot be tried: {error.strerror}") from None
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    try:
        _handshake(context, client)
    except ssl.SSLError as error:
        if error.reason == "EXCESSIVE_MESSAGE_SIZE":
            problem, fix = _too_large(certificate, _CERTIFICATE.findall(pair.certificate))
        else:
            problem, fix = f"no client can connect with {certificate} and {key}: {_reason(error)}", _RENEW
        raise ConfigError(f"server.tls_certificate: {problem}; {fix}") from None
    return pair


def _too_large(path: str, certificates: Sequence[bytes]) -> tuple[str, str]:
    """Return what is wrong with certificates that no client accepts together, and what helps."""
    if len(b"".join(certificates[:1])) > len(b"".join(certificates[1:])):
        return f"the certificate in {path} is too large for clients", "renew it for fewer names"
    problem = f"{path} has {len(certificates):,} certificates, which is too large for clients"
    return problem, "leave only the certificate of this service and those of its issuers"


def _read_certificates(path: str) -> bytes:
    """Return the content of a file whose certificates can all be read. Raises ConfigError."""
    content = _read("server.tls_certificate", path)
    begun, whole = content.count(b"-----BEGIN CERTIFICATE-----"), _CERTIFICATE.findall(content)
    if not begun:
        problem = "has no certificate in PEM form (-----BEGIN CERTIFICATE-----)"
        fix = "name the file that has it, such as certbot's fullchain.pem"
        raise ConfigError(f"server.tls_certificate: {path} {problem}; {fix}")
    if len(whole) < begun:
        raise ConfigError(f"server.tls_certificate: {path} has a certificate that is cut off; {_RESTORE}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for number, certificate in enumerate(whole, 1):
        try:
            context.load_verify_locations(cadata=certificate.decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise ConfigError(
                f"server.tls_certificate: certificate {number} in {path} is damaged; {_RESTORE}"
            ) from None
    return content


def _read_key(path: str) -> bytes:
    """Return the content of a file that has a whole private key without a passphrase. Raises ConfigError."""
    content = _read("server.tls_key", path)
    if b"PRIVATE KEY-----" not in content:
        fix = "name the file that has it, such as certbot's privkey.pem"
        raise ConfigError(f"server.tls_key: {path} has no private key in PEM form (PRIVATE KEY-----); {fix}")
    if b"ENCRYPTED" in content:
        fix = "store it without a passphrase, readable for the service only"
        raise ConfigError(f"server.tls_key: {path} is encrypted; {fix}")
    if _PRIVATE_KEY.search(content) is None:
        raise ConfigError(f"server.tls_key: {path} has a private key that is cut off; {_RESTORE}")
    return content


def _read(key: str, path: str) -> bytes:
    """Return the content of a file, without the mark that some editors put at its beginning. Raises ConfigError."""
    content = read_file(key, path, _MAX_FILE).removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        raise ConfigError(f"{key}: {path} is empty; {_RESTORE}")
    return content


def _why_unusable(error: ssl.SSLError, certificate: str, key: str) -> str:
    """Say why a key cannot be used with certificates that can be read."""
    if error.reason is None:
        return f"server.tls_key: the private key in {key} is damaged, or not of a kind for TLS; {_RESTORE}"
    if error.reason in _MISMATCHES:
        return f"server.tls_key: {key} does not belong to the certificate in {certificate}; renew both"
    return f"server.tls_certificate: {certificate} and {key} cannot be used: {_reason(error)}; {_RENEW}"


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "broken").replace("_", " ").lower()


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

    @property
    def refused(self) -> bool:
        """Whether clients refuse it, whatever issuers they trust."""
        return self.until is not None and self.problem != ""

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
