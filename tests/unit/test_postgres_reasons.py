"""What is said when PostgreSQL fails."""

import asyncpg
import pytest

from tokenauth.stores.postgres.connections import reason


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (asyncpg.InternalClientError("cannot switch to state 12"), "the connection was closed during an operation"),
        (asyncpg.ProtocolError("unexpected message"), "ProtocolError: unexpected message"),
        (ConnectionRefusedError(111, "Connection refused"), "ConnectionRefusedError: Connection refused"),
    ],
)
def test_a_state_of_the_driver_is_no_reason(error: Exception, expected: str) -> None:
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = error
    assert reason(wrapped).startswith(expected)
