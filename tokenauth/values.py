"""Token values: strings that mean nothing, cannot be guessed, and are looked up by their digest."""

import secrets
import uuid
from binascii import a2b_qp
from collections.abc import Iterator
from hashlib import sha256

LENGTH = 64
LONGEST_SPELLING = 4 * LENGTH * len(r"\u0041")
"""Bytes that a value can take up: escaped, in UTF-32."""

ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

# A random byte maps to a letter without bias only below the largest multiple of 62.
_UNBIASED = len(ALPHABET) * (256 // len(ALPHABET))
_LETTER = bytes(ALPHABET[byte % len(ALPHABET)] for byte in range(256))
_BIASED = bytes(range(_UNBIASED, 256))

_DECODINGS = 2
"""Escapes within escapes that are seen through, such as those of JSON in a form."""

_BLANKS = b" \t\r\n\v\f"
_SEPARATOR = 10
_IS_LETTER = bytes(97 if byte in ALPHABET else _SEPARATOR for byte in range(256))

# Every way to write `%41`, and what only separates. In this order.
_SPELLINGS = (
    (rb"\\", b"\\"),
    (rb"\n", b"\n"),
    (rb"\r", b"\n"),
    (rb"\t", b"\n"),
    (b"\r", b"\n"),
    (rb"\u00", b"%"),
    (rb"\x", b"%"),
    (b"%u00", b"%"),
    (b"+", b" "),
    (b"=", b"%3D"),
    (b"%", b"="),  # now it is quoted-printable, which the standard library decodes in C
)


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
    """Find all that looks like a value in a text, whatever is around it and however it is spelt.

    It decodes percent-encoding, quoted-printable, the escapes of JSON strings, UTF-16 and UTF-32, and joins what line
    breaks or blanks have cut. The work is linear, whatever is sent: strangers choose the text.
    """
    text = text.replace(b"\0", b"")
    if text.isalnum() and len(text) <= LENGTH:
        return [text] if len(text) == LENGTH else []
    found: dict[bytes, None] = {}
    for reading in _readings(text):
        for start, end in _long_words(reading):
            if end - start == LENGTH:
                found[reading[start:end]] = None
    return list(found)


def _readings(text: bytes) -> Iterator[bytes]:
    """Read a text as it is and decoded, and each of that with its lines joined, and without blanks."""
    for _ in range(1 + _DECODINGS):
        for reading in (text, *_continued(text)):
            yield reading
            lines = reading.replace(b"\r", b"").replace(b"\n ", b"").replace(b"\n\t", b"").replace(b"\n", b"")
            if len(lines) < len(reading):
                yield lines
            joined = lines.translate(None, _BLANKS)
            if len(joined) < len(lines):
                yield joined
        decoded = text
        for spelling, plain in _SPELLINGS:
            decoded = decoded.replace(spelling, plain)
        decoded = a2b_qp(decoded)
        if decoded == text:
            return
        text = decoded


def _continued(text: bytes, nested: bool = True) -> Iterator[bytes]:
    """Join lines that say that they go on: with a backslash, or as quoted-printable (RFC 2045 section 6.7)."""
    lines = text.replace(b"\r", b"")
    joined = lines.replace(b"\\\n", b"").replace(b"=\n", b"")
    if len(joined) < len(lines):
        yield joined
    if b"=" in text:
        plain = a2b_qp(text)
        if len(plain) < len(text):
            yield plain
            if nested:
                yield from _continued(plain, nested=False)


def _long_words(text: bytes) -> Iterator[tuple[int, int]]:
    """Say where words of LENGTH letters or more begin and end.

    Each of them is on one of the places LENGTH - 1, 2 * LENGTH - 1, ...: only there need be looked.
    """
    letters = text.translate(_IS_LETTER)
    at = LENGTH - 1
    while at < len(letters):
        if letters[at] == _SEPARATOR:
            at += LENGTH
            continue
        start = letters.rfind(_SEPARATOR, 0, at) + 1
        end = letters.find(_SEPARATOR, at)
        if end < 0:
            end = len(letters)
        if end - start >= LENGTH:
            yield start, end
        at = end + LENGTH
