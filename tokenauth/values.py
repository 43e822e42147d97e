"""Token values: random strings that are looked up by their digest."""

import os
import re
from binascii import a2b_qp
from collections.abc import Iterator
from hashlib import sha256
from zlib import crc32

from tokenauth.errors import InvalidRequest

LENGTH = 64
MAX_ENCODED_LENGTH = 4 * LENGTH * len("&#x0041;")
"""Maximum length of an encoded value, in bytes: escaped, in UTF-32."""

ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

# A random byte maps to a letter without bias only below the largest multiple of 62.
_UNBIASED = len(ALPHABET) * (256 // len(ALPHABET))
_LETTER = bytes(ALPHABET[byte % len(ALPHABET)] for byte in range(256))
_BIASED = bytes(range(_UNBIASED, 256))

_DECODINGS = 2
"""Number of nested encodings that are decoded, such as JSON in a form."""

NAMED_PREFIX = "tkn"
"""How the value of a named token begins. That of a login begins in the same way once in 238,328 times."""

_CHECKSUM_LENGTH = 6
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

_HEX = frozenset("0123456789abcdef")
_WORD = re.compile(r"[A-Za-z0-9]+")
_BLANKS = b" \t\r\n\v\f"
_SEPARATOR = 10
_IS_LETTER = bytes(97 if byte in ALPHABET else _SEPARATOR for byte in range(256))

# Colours of terminals (ECMA-48 section 5.4), also as `\033`, `\e` or `^[` write them. Each match ends before the next.
_COLOUR = re.compile(rb"(?:\x1b|\\033|\\e|\^\[)\[[0-?]*[ -/]*[@-~]")
# A line break, and what mail, diffs and comments put before the next line. The second joins every other line.
_BREAK = re.compile(rb"\n[ \t>+|#*/\n-]*")
_EVERY_OTHER_BREAK = re.compile(rb"\n[ \t>+|#*/-]*([^\n]*\n*)")
_HEX_REFERENCE = re.compile(rb"&#[xX]0*([0-9a-fA-F]{2});")
_DECIMAL_REFERENCE = re.compile(rb"&#0*([0-9]{1,3});")
_REFERENCED = {str(code).encode(): bytes([code]) for code in range(32, 127)}

# Escapes of one character, rewritten to `%41`, and escapes of line breaks. The order matters.
_ESCAPES = (
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
    """Return a new token value: 64 characters of A-Z a-z 0-9 (381 bits of entropy)."""
    letters = b""
    while len(letters) < LENGTH:
        letters += os.urandom(96).translate(_LETTER, _BIASED)
    return letters[:LENGTH].decode()


def new_named_value() -> str:
    """Return a new value of a named token, which secret scanners recognize (`docs/named-tokens.md`).

    It is NAMED_PREFIX, 55 random characters (327 bits of entropy), and the CRC-32 of all these in base 62.
    """
    start = NAMED_PREFIX + new_value()[: LENGTH - len(NAMED_PREFIX) - _CHECKSUM_LENGTH]
    return start + _checksum(start)


def _checksum(text: str) -> str:
    number, digits = crc32(text.encode()), ""
    for _ in range(_CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits


def digest(value: bytes) -> bytes | None:
    """Return the SHA-256 digest of a value, or None if it does not have the form of a token value."""
    if len(value) == LENGTH and value.isalnum():
        return sha256(value).digest()
    return None


def refuse_value(text: str, field: str) -> None:
    """Raise InvalidRequest about `field` if a word of a text has the form of a token: it would be stored and logged.

    64 hexadecimal digits are accepted: they name a container or a commit, and no random value has only those.
    """
    if redact(text) != text:
        raise InvalidRequest(f"{field}: has the form of a token, or contains one. Choose another text.")


def redact(text: str) -> str:
    """Replace each word of a text that has the form of a token, as `refuse_value` does not allow it."""
    return _WORD.sub(
        lambda word: "(token)" if len(word[0]) == LENGTH and not _HEX.issuperset(word[0]) else word[0], text
    )


def find_values(text: bytes) -> list[bytes]:
    """Return what in a text has the form of a token value, in the usual encodings and between any other characters.

    This decodes percent-encoding, quoted-printable, escapes of JSON strings, numeric references of HTML, UTF-16 and
    UTF-32, removes colours of terminals, and joins values that line breaks or blanks have split, also where mail or a
    diff marks each line. Named values are found inside longer words, too. It takes linear time for any input.
    """
    text = text.replace(b"\0", b"")
    if text.isalnum() and len(text) <= LENGTH:
        return [text] if len(text) == LENGTH else []
    found: dict[bytes, None] = {}
    for variant in _variants(text):
        for start, end in _long_words(variant):
            if end - start == LENGTH:
                found[variant[start:end]] = None
            else:
                found.update(dict.fromkeys(_named_values(variant, start, end)))
    return list(found)


def _variants(text: bytes) -> Iterator[bytes]:
    """Yield the text and its decodings, each also without colours, with its lines joined and without blanks."""
    for _ in range(1 + _DECODINGS):
        yield from _rejoined(text)
        colourless, number = _COLOUR.subn(b"", text)
        if number:
            yield from _rejoined(colourless)
            yield from _rejoined(_COLOUR.sub(b" ", text))
        decoded = text
        if b"&" in text:
            decoded = text.replace(b"&amp;", b"&")
            decoded = _DECIMAL_REFERENCE.sub(lambda match: _REFERENCED.get(match[1], b" "), decoded)
            decoded = _HEX_REFERENCE.sub(rb"%\1", decoded)
        for escape, plain in _ESCAPES:
            decoded = decoded.replace(escape, plain)
        decoded = a2b_qp(decoded)
        if decoded == text:
            return
        text = decoded


def _rejoined(text: bytes) -> Iterator[bytes]:
    """Yield the text, also with its lines joined and without blanks."""
    for variant in (text, *_joined(text)):
        yield variant
        lines = variant.replace(b"\r", b"").replace(b"\n ", b"").replace(b"\n\t", b"").replace(b"\n", b"")
        if len(lines) < len(variant):
            yield lines
        joined = lines.translate(None, _BLANKS)
        if len(joined) < len(lines):
            yield joined
    if b"\n" in text:
        lines = text.replace(b"\r", b"")
        yield _BREAK.sub(b"", lines)
        yield _EVERY_OTHER_BREAK.sub(rb"\1", lines)
        yield _EVERY_OTHER_BREAK.sub(rb"\1", b"\n" + lines)


def _joined(text: bytes, nested: bool = True) -> Iterator[bytes]:
    """Yield the text with continued lines joined: with a backslash, or quoted-printable (RFC 2045 section 6.7)."""
    lines = text.replace(b"\r", b"")
    joined = lines.replace(b"\\\n", b"").replace(b"=\n", b"")
    if len(joined) < len(lines):
        yield joined
    if b"=" in text:
        plain = a2b_qp(text)
        if len(plain) < len(text):
            yield plain
            if nested:
                yield from _joined(plain, nested=False)


def _long_words(text: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of each word of LENGTH letters or more.

    Such a word covers one of the positions LENGTH - 1, 2 * LENGTH - 1, ..., so only those are examined.
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


def _named_values(text: bytes, start: int, end: int) -> Iterator[bytes]:
    """Yield the values of named tokens in a longer word: their checksum tells where they are."""
    prefix = NAMED_PREFIX.encode()
    while (start := text.find(prefix, start, end)) >= 0 and start + LENGTH <= end:
        value = text[start : start + LENGTH]
        body, checksum = value[:-_CHECKSUM_LENGTH], value[-_CHECKSUM_LENGTH:].decode()
        # The last digit is compared first, because a text can be full of prefixes.
        if checksum[-1] == _DIGITS[crc32(body) % len(_DIGITS)] and checksum == _checksum(body.decode()):
            yield value
        start += 1
