"""Token values: strings that mean nothing, cannot be guessed, and are looked up by their digest."""

import re
import secrets
import uuid
from hashlib import sha256
from urllib.parse import unquote_to_bytes

LENGTH = 64
LONGEST_SPELLING = LENGTH * len(r"\u0041") + 16
"""Bytes that a value can take up where it is escaped, with what is next to it."""

ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

# A random byte maps to a letter without bias only below the largest multiple of 62.
_UNBIASED = len(ALPHABET) * (256 // len(ALPHABET))
_LETTER = bytes(ALPHABET[byte % len(ALPHABET)] for byte in range(256))
_BIASED = bytes(range(_UNBIASED, 256))
_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_EMBEDDED = re.compile(rb"(?<![A-Za-z0-9])[A-Za-z0-9]{%d}(?![A-Za-z0-9])" % LENGTH)


def new_value() -> str:
    """Make a value of 64 characters of A-Z a-z 0-9: 381 bits from the operating system."""
    letters = b""
    while len(letters) < LENGTH:
        letters += secrets.token_bytes(96).translate(_LETTER, _BIASED)
    return letters[:LENGTH].decode()


def new_uuid() -> str:
    """Make a random UUID (RFC 9562 section 5.4): 122 bits from the operating system."""
    return str(uuid.uuid4())


def new_prefixed() -> str:
    """Make a value that says what it is: `token_` and a value of 64 characters."""
    return f"token_{new_value()}"


def digest(value: bytes) -> bytes | None:
    """Hash a value (32 bytes, SHA-256) for looking it up; None when no token can look like this."""
    if len(value) == LENGTH and value.isalnum():
        return sha256(value).digest()
    return None


def find_values(text: bytes) -> list[bytes]:
    """Find everything in `text` that looks like a value, whatever stands around it and however it is spelt.

    Percent-encoding, the escapes of JSON strings and UTF-16 are seen through.
    """
    text = text.replace(b"\0", b"")
    if text.isalnum() and len(text) <= LENGTH:
        return [text] if len(text) == LENGTH else []
    spellings = [text, unquote_to_bytes(text)]
    spellings += [_ESCAPE.sub(_unescape, spelling) for spelling in spellings if b"\\" in spelling]
    return list(dict.fromkeys(value for spelling in spellings for value in _EMBEDDED.findall(spelling)))


def _unescape(match: re.Match[bytes]) -> bytes:
    code = int(match[1] or b"20", 16)
    return bytes([code]) if code < 128 else b" "
