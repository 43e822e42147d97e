"""Users from a file of Apache's htpasswd, beside `[[users]]`."""

import re
import shlex
from collections.abc import Mapping

from tokenauth.errors import ConfigError
from tokenauth.models import FileLine
from tokenauth.settings.fields import SettingError
from tokenauth.settings.files_read import read_file
from tokenauth.settings.model import FileUserSettings, UsersFileSettings, canonical

_MAX_SIZE = 16 << 20

_ACCEPTED = re.compile(r"\$(2[aby]|argon2(id|i|d)|scrypt|pbkdf2-sha256)\$")

_REFUSED = (
    (re.compile(r"\$apr1\$|\$1\$"), "an MD5 hash (apr1), which is guessed in seconds"),
    (re.compile(r"\{SHA\}|\{SSHA\}", re.IGNORECASE), "a SHA-1 hash, which is guessed in seconds"),
    (re.compile(r"\$[56y]\$|\$gy\$|\$7\$"), "a hash of the system's crypt, which tokenauth cannot check"),
    (re.compile(r"[./0-9A-Za-z]{13}\Z"), "a hash of DES crypt, which uses 8 characters only, or plain text"),
    (re.compile(""), "in plain text, or a hash that tokenauth does not know"),
)


def read(settings: UsersFileSettings, known: Mapping[str, object]) -> tuple[FileUserSettings, ...]:
    """Return the users of the file. Raises ConfigError, which has the line and never a hash.

    known: the canonical names of `[[users]]`, none of which may be in the file.
    """
    path, found, lines = settings.path, list[FileUserSettings](), dict[str, int]()
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = FileLine(path, number)
        name, colon, rest = line.rstrip("\r").partition(":")
        if not colon:
            raise ConfigError(f"users_file.path: {where}: has no colon between a name and a hash; write name:hash")
        try:
            user = FileUserSettings(
                username=name, password=rest.partition(":")[0].rstrip(), scopes=settings.scopes, origin=where
            )
        except SettingError as error:
            raise ConfigError(f"users_file.path: {where}: {error.key} {error.problem}") from None
        key = canonical(name)
        if key in known:
            raise ConfigError(f"users_file.path: {where}: {name!r} is in [[users]], too: remove one of the two")
        if key in lines:
            raise ConfigError(f"users_file.path: {where}: {name!r} is in line {lines[key]}, too: remove one of the two")
        if not _ACCEPTED.match(user.password):
            problem = next(text for form, text in _REFUSED if form.match(user.password))
            fix = how_to_renew(path, name)
            raise ConfigError(f"users_file.path: {where}: the password of {name!r} is {problem}; {fix}")
        lines[key] = number
        found.append(user)
    return tuple(found)


def how_to_renew(path: str, name: str) -> str:
    """Return the command that sets a new password."""
    return f"run `htpasswd -B -C 12 {shlex.quote(path)} {shlex.quote(name)}`"


def how_to_remove(path: str, name: str) -> str:
    """Return the command that removes a user."""
    return f"run `htpasswd -D {shlex.quote(path)} {shlex.quote(name)}`"


def _text(path: str) -> str:
    data = read_file("users_file.path", path, _MAX_SIZE)
    if not data.strip():  # a program may be writing it
        raise ConfigError(f"users_file.path: {path} is empty; if it is to have no users, write # into it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"users_file.path: {path}, line {line} is not UTF-8; save the file as UTF-8, or change users_file.path"
        ) from None
