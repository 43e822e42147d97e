"""Token values: their form and their randomness, and how they are found in text."""

import re
import string
from collections import Counter
from hashlib import sha256
from time import thread_time
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenauth.errors import InvalidRequest
from tokenauth.values import ALPHABET, LENGTH, digest, find_values, new_named_value, new_value, refuse_value

VALUE = b"aB3" * 21 + b"z"


@pytest.fixture(scope="module")
def values() -> list[str]:
    return [new_value() for _ in range(100_000)]


def test_a_named_value_ends_with_a_checksum_of_the_rest() -> None:
    made = {new_named_value() for _ in range(1000)}
    assert len(made) == 1000
    for value in made:
        assert re.fullmatch("tkn[A-Za-z0-9]{61}", value)
        number = 0
        for letter in value[58:]:
            number = number * 62 + (string.digits + string.ascii_uppercase + string.ascii_lowercase).index(letter)
        assert number == crc32(value[:58].encode())


def test_the_alphabet_is_ascii_letters_and_digits() -> None:
    assert sorted(ALPHABET.decode()) == sorted(set(ALPHABET.decode()))
    assert len(ALPHABET) == 62
    assert ALPHABET.isalnum()


def test_a_value_is_64_characters_of_the_alphabet(values: list[str]) -> None:
    assert {len(value) for value in values} == {64} == {LENGTH}
    assert set().union(*values) == set(ALPHABET.decode())


def test_a_hundred_thousand_values_are_distinct(values: list[str]) -> None:
    assert len(set(values)) == 100_000


def chi_squared(counts: Counter[str]) -> float:
    """Return the chi-squared statistic of counts: 61 degrees of freedom, so about 61 ± 11."""
    expected = counts.total() / 62
    return sum((counts[letter] - expected) ** 2 / expected for letter in ALPHABET.decode())


def test_every_letter_is_as_frequent_as_every_other(values: list[str]) -> None:
    """An unbiased source exceeds the bound once in a billion runs. Without the rule against bias it is 30,000."""
    assert chi_squared(Counter("".join(values))) < 150


@pytest.mark.parametrize("position", [0, 1, 31, 62, 63])
def test_every_letter_is_as_frequent_at_each_place(values: list[str], position: int) -> None:
    assert chi_squared(Counter(value[position] for value in values)) < 150


def test_neighbouring_letters_are_independent(values: list[str]) -> None:
    """3,844 pairs: 3,843 degrees of freedom, so about 3,843 ± 88."""
    pairs = Counter(value[place : place + 2] for value in values[:50_000] for place in range(0, 64, 2))
    expected = pairs.total() / 3844
    assert len(pairs) == 3844
    assert abs(sum((count - expected) ** 2 / expected for count in pairs.values()) - 3843) < 88 * 6


def test_a_digest_is_sha_256(values: list[str]) -> None:
    for value in values[:100]:
        assert digest(value.encode()) == sha256(value.encode()).digest()


@pytest.mark.parametrize(
    "malformed",
    [
        b"",
        b"a",
        VALUE[:-1],
        VALUE + b"a",
        VALUE[:-1] + b"\n",
        b" " + VALUE[1:],
        VALUE[:-1] + b"-",
        VALUE[:-1] + b"_",
        VALUE[:-1] + b"\x00",
        VALUE[:-1] + b"\xff",
        VALUE[:-1] + b"=",
        "٣".encode() * 32,
        "é".encode() * 32,
        "\N{MATHEMATICAL BOLD DIGIT ONE}".encode() * 16,
        "ª".encode() * 32,
    ],
)
def test_what_no_token_can_look_like_has_no_digest(malformed: bytes) -> None:
    assert digest(malformed) is None


@given(st.binary(max_size=80) | st.binary(min_size=64, max_size=64))
def test_only_64_letters_of_the_alphabet_have_a_digest(value: bytes) -> None:
    well_formed = len(value) == 64 and set(value) <= set(ALPHABET)
    assert digest(value) == (sha256(value).digest() if well_formed else None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", []),
        (VALUE, [VALUE]),
        (b"Bearer " + VALUE, [VALUE]),
        (b'{"token":"' + VALUE + b'"}', [VALUE]),
        (b"token=" + VALUE + b"&token=" + VALUE[::-1], [VALUE, VALUE[::-1]]),
        (VALUE + b"," + VALUE, [VALUE]),
        (b"a" + VALUE, []),
        (VALUE + b"1", []),
        (VALUE * 2, []),
        (VALUE[:-1], []),
        (b"\xff" + VALUE + b"\x00", [VALUE]),
        (b"_" + VALUE + b"-", [VALUE]),
    ],
)
def test_values_are_found_between_any_characters(text: bytes, found: list[bytes]) -> None:
    assert find_values(text) == found


HALVES = VALUE[:40], VALUE[40:]
WRITTEN = {
    "in colour": b"token \x1b[32m%s\x1b[0m." % VALUE,
    "as grep colours it": b"a:\x1b[01;31m\x1b[K%s\x1b[m\x1b[K\n" % VALUE,
    "half in colour": b"\x1b[31m%s\x1b[0m%s\x1b[0m" % HALVES,
    "in colour between letters": b"a\x1b[31m%s\x1b[0mb" % VALUE,
    "in colour in JSON": b'{"log": "\\u001b[32m%s\\u001b[0m"}' % VALUE,
    "in colour in JSON in JSON": b'{"log": "{\\"a\\": \\"\\\\u001b[32m%s\\\\u001b[0m\\"}"}' % VALUE,
    "in colour in a shell": b"echo '\\e[32m%s\\e[0m' '\\033[1mx'" % VALUE,
    "in colour as cat shows it": b"^[[32m%s^[[0m" % VALUE,
    "in colour, percent-encoded": b"%%1B[32m%s%%1B[0m" % VALUE,
    "in hexadecimal references": b"<p>" + b"".join(b"&#x%x;" % byte for byte in VALUE) + b"</p>",
    "in padded references": b"".join(b"&#X%04X;" % byte for byte in VALUE),
    "in decimal references": b"x=" + b"".join(b"&#%d;" % byte for byte in VALUE),
    "in references in HTML": b"".join(b"&amp;#%d;" % byte for byte in VALUE),
    "with one reference": b"a " + VALUE.replace(b"a", b"&#97;", 1) + b" b",
    "in quoted mail": b"> it is %s\n> %s and\n> this\n" % HALVES,
    "in mail quoted twice": b">> %s\r\n>> %s\r\n>> words\r\n" % HALVES,
    "in removed lines": b"-%s\n-%s\n-more\n" % HALVES,
    "in added lines": b"+one\n+%s\n+%s\n+more\n" % HALVES,
    "in a comment": b"# %s\n# %s\n# more\n" % HALVES,
    "between lines of words": b"words\n%s\n%s\nwords\n" % HALVES,
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_value_in_a_log_mail_or_page_is_found(how: str) -> None:
    assert VALUE in find_values(WRITTEN[how])


def test_named_values_are_found_inside_longer_words() -> None:
    named = [new_named_value().encode() for _ in range(3)]
    assert find_values(b"m%s" % named[0]) == find_values(b"%s1" % named[0]) == [named[0]]
    assert find_values(b"tkn" + b"".join(named)) == named
    wrong = b"b" if named[0].endswith(b"a") else b"a"
    assert find_values(b"m%s%s" % (named[0][:-1], wrong)) == [], "the checksum is wrong"


# The worst that is known for each step of the search.
HOSTILE = [
    b"\x1b[", b"\x1b[1", b"\\033[", b"^[", b"\n", b"\n ", b"\n>", b"a\n", b"-", b"&#x0", b"&#0", b"&#", b"&amp;",
    b"&#65;", b"&#x41;", b"tkn", b"tkna", b"=\n", b"%41",
]  # fmt: skip


def seconds(text: bytes) -> float:
    start = thread_time()
    find_values(text)
    return thread_time() - start


@pytest.mark.parametrize("piece", HOSTILE)
def test_the_search_takes_linear_time_for_any_text(piece: bytes) -> None:
    """Four times the text takes 4 times as long; 16 times, if one step were quadratic."""
    short, long = (piece * (size // len(piece)) for size in (1 << 14, 1 << 16))
    assert min(seconds(long) for _ in range(3)) < 9 * min(seconds(short) for _ in range(3)) + 0.01


def test_a_text_in_the_form_of_a_token_is_refused_as_a_name() -> None:
    named = new_named_value()
    for value in (
        new_value(),
        named,
        "A" * 64,
        f"Bearer {named}",
        f"leaked ({named}).",
        f"{new_value()}\n",
        f"x_{named}",
    ):
        with pytest.raises(InvalidRequest, match="holder: has the form of a token"):
            refuse_value(value, "holder")
    container = sha256(b"a container").hexdigest()
    for text in ("ci-7", "F" * 63, "F" * 65, "F" * 40 + " " + "F" * 24, container, f"sha256:{container}"):
        refuse_value(text, "holder")
