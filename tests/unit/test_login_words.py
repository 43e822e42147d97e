"""What the login page says to a person whose form was refused."""

import pytest

from tokenauth.errors import (
    ClientGone,
    InvalidCredentials,
    InvalidRequest,
    Overloaded,
    Refusal,
    StoreUnavailable,
    TooManyAttempts,
)
from tokenauth.web.routes.login import explain, in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (1, "1 second"),
        (1.2, "2 seconds"),
        (59, "59 seconds"),
        (60, "1 minute"),
        (61, "61 seconds"),
        (120, "2 minutes"),
        (121, "3 minutes"),
        (3600, "1 hour"),
        (5400, "90 minutes"),
        (129600, "36 hours"),
        (86400, "1 day"),
        (30 * 86400, "30 days"),
    ],
)
def test_a_time_is_said_in_words_and_never_too_short(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (InvalidCredentials(), "The user name or the password is wrong."),
        (TooManyAttempts(retry_after=180), "Too many failed logins. Try again in 3 minutes."),
        (Overloaded(), "The server is busy. Try again shortly."),
        (ClientGone(), "The server is busy. Try again shortly."),
        (StoreUnavailable(), "Nobody can log in now: the database is unavailable. Try again shortly."),
        (InvalidRequest("username: x"), "This cannot be a user name and a password: username: x."),
        (None, ""),
    ],
)
def test_a_refusal_is_explained(refusal: Refusal | None, words: str) -> None:
    assert explain(refusal) == words
