"""Requests that are cut, merged and re-framed: no request out of a body, and no answer to the wrong request.

At length in `make faults`: tests/system/faults/test_framing.py.
"""

from collections.abc import Mapping

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support import fuzzing
from tests.support.framing import Reading, read
from tests.support.fuzzing import TARGETS, Answer
from tests.support.servers import Server


def answers_of(port: int) -> Mapping[bytes, Answer]:
    """Return the answer to each target. No two are equal."""
    found = {}
    for target in TARGETS:
        request = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target
        (found[target],) = fuzzing.exchange(port, [request], [Reading(b"GET", target, b"")])
    assert len(set(found.values())) == len(TARGETS)
    return found


def fuzz(server: Server, number: int, count: int) -> None:
    """Send `count` streams. The number of the seed is in a failure."""
    expected = answers_of(server.port)

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzzing.streams())
    def send(segments: list[bytes]) -> None:
        stream = read(b"".join(segments))
        answers = fuzzing.exchange(server.port, segments, stream.requests)
        found = fuzzing.fault(stream, answers, expected)
        assert found is None, (found, answers, stream)
        second = fuzzing.by_h11(b"".join(segments))
        if second is not None and stream.valid and all(request.body is not None for request in stream.requests):
            assert stream.requests == second[: len(stream.requests)], "the reference parsers disagree"

    try:
        send()
    except BaseException as error:
        error.add_note(f"seed {number}")
        raise
    assert server.errors() == []
    assert "Traceback" not in server.log.read_text()


def test_no_request_out_of_a_body_and_no_wrong_answer(server: Server) -> None:
    fuzz(server, 1, 60)


def test_an_answer_of_the_application_to_head_has_no_body(server: Server) -> None:
    """Also if it is a refusal, and another answer follows."""
    stream = b"HEAD /api/token?x=1 HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    answers = fuzzing.exchange(server.port, [stream], read(stream).requests)
    assert [(answer.status, bool(answer.body)) for answer in answers] == [(400, False), (200, True)]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([Answer(200, b"b")], "request 0 got the answer"),
        ([Answer(200, b"a"), Answer(200, b"a")], "more answers than requests"),
        ([], "a request is not answered"),
        ([Answer(500, b"")], "request 0: 500"),
    ],
)
def test_a_wrong_answer_is_noticed(answers: list[Answer], said: str) -> None:
    """A negative control."""
    stream = read(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
    expected = {b"/a": Answer(200, b"a")}
    assert fuzzing.fault(stream, [Answer(200, b"a")], expected) is None
    found = fuzzing.fault(stream, answers, expected)
    assert found is not None
    assert said in found


def test_an_early_answer_must_say_that_it_closes() -> None:
    """A negative control: a request may be answered before its body has arrived, and then ends the connection."""
    stream = read(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nxGET /a HTTP/1.1\r\nHost: x\r\n\r\n")
    assert fuzzing.fault(stream, [Answer(405, b"", closes=True)], {}) is None
    assert fuzzing.fault(stream, [Answer(405, b"")], {}) == "a request is not answered"
