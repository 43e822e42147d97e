"""Token values: their form and their randomness, and how they are found in text."""

import re
import string
from collections import Counter
from hashlib import sha256
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenauth.values import ALPHABET, LENGTH, digest, find_values, new_named_value, new_value

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
