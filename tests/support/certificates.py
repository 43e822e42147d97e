"""Certificates for TLS, signed by themselves."""

import subprocess
from pathlib import Path
from typing import NamedTuple


class Certificate(NamedTuple):
    """The files of a certificate and its key."""

    certificate: Path
    key: Path

    def settings(self) -> str:
        """Return the lines for [server]."""
        return f'tls_certificate = "{self.certificate}"\ntls_key = "{self.key}"\n'


def make_certificate(directory: Path, name: str = "one", *extensions: str, curve: str = "prime256v1") -> Certificate:
    """Make a certificate for 127.0.0.1 whose organization is `name`, valid for 30 days."""
    made = Certificate(directory / f"{name}.pem", directory / f"{name}.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", f"ec_paramgen_curve:{curve}", "-nodes"]
    command += ["-subj", f"/O={name}", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-days", "30"]
    for extension in extensions:
        command += ["-addext", extension]
    command += ["-keyout", str(made.key), "-out", str(made.certificate)]
    subprocess.run(command, check=True, capture_output=True)
    made.key.chmod(0o600)
    return made


_AUTHORITY = """
[ca]
default_ca = own
[own]
dir = {0}
database = {0}/index
serial = {0}/serial
new_certs_dir = {0}
default_md = sha256
policy = any
[any]
organizationName = supplied
"""


def make_expired(directory: Path, end: str = "200201000000Z") -> Certificate:
    """Make a certificate that was valid in January 2020, or until another end."""
    made = make_certificate(directory, "expired")
    request, settings = directory / "request", directory / "settings"
    settings.write_text(_AUTHORITY.format(directory))
    (directory / "index").touch()
    (directory / "serial").write_text("01")
    key = ["-key", str(made.key)]
    dates = ["-startdate", "200101000000Z", "-enddate", end]
    files = ["-in", str(request), "-out", str(made.certificate)]
    for command in (
        ["req", "-new", *key, "-subj", "/O=expired", "-out", str(request)],
        ["ca", "-batch", "-notext", "-selfsign", "-keyfile", str(made.key), "-config", str(settings), *dates, *files],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    return made
