"""The server and a strict HTTP parser agree on where each request ends, or the connection closes."""

import random
import re
from itertools import islice

from tests.support.framing import INNER, Reading, Stream, read, sequences
from tests.support.speaking import Outcome, Recorder, options, speak

REFUSALS = {400, 431}


def judge(stream: Stream, outcome: Outcome, reads: bool) -> str | None:
    """Return what is wrong with the outcome of a stream, or None. `reads`: the app reads bodies before it answers."""
    expected = [_routed(request, reads) for request in stream.requests]
    executed = outcome.executed
    last = len(executed) - 1
    if 0 <= last < len(expected) and outcome.closed and executed[last].body is None:  # refused in the middle
        expected[last] = expected[last]._replace(body=None)
    if executed != expected[: len(executed)]:
        return "a request is executed that the strict parser does not find"
    refused = bool(outcome.statuses) and outcome.statuses[-1] in REFUSALS
    answers = outcome.statuses[:-1] if refused else outcome.statuses
    due = {sum(request.body is not None for request in executed)}
    if not reads:  # the last one may be refused before it is answered, if its body is malformed
        due = {len(executed), len(executed) - refused}
    if set(answers) > {299} or len(answers) not in due:
        return "the number of responses differs from the number of requests"
    if refused and not outcome.closed:
        return "the connection stays open after a refusal"
    if not outcome.closed and (not stream.valid or len(executed) < len(expected)):
        return "the connection stays open although the parsers disagree"
    return None


def _routed(request: Reading, reads: bool) -> Reading:
    """Return a request as the app receives it."""
    target = re.sub(rb"^[a-zA-Z][a-zA-Z0-9+.-]*://[^/?#]*", b"", request.target).partition(b"#")[0]
    path, _, query = target.partition(b"?")
    target = (path or b"/") + (b"?" + query if query else b"")
    return Reading(request.method, target, request.body if reads else None)


async def disagreements(seed: int, count: int) -> list[str]:
    """Send malformed streams; return those on which the parsers disagree, with the reason."""
    config, source, found = options(Recorder(reads=True)), random.Random(seed), []
    for segments in islice(sequences(seed, odd=True), count):
        reads, hurry = source.random() < 0.7, source.random() < 0.5
        outcome = await speak(segments, reads, hurry, config)
        stream = read(b"".join(segments))
        if not stream.valid and not outcome.closed:  # the server may still wait for the end of the malformed request
            segments.append(b"\r\n\r\n" + INNER * 2)
            outcome = await speak(segments, reads, hurry, config)
        fault = judge(stream, outcome, reads)
        if fault is not None:
            found.append(f"{fault} ({reads=}, {hurry=}): {segments}\n{outcome}\n{stream}")
    return found


async def test_two_parsers_agree_on_where_requests_end() -> None:
    assert await disagreements(seed=1, count=600) == []


async def test_valid_requests_are_answered_in_any_segments() -> None:
    config = options(Recorder(reads=True))
    for segments in islice(sequences(seed=2, odd=False), 400):
        stream = read(b"".join(segments))
        outcome = await speak(segments, True, len(segments) % 2 == 0, config)
        assert judge(stream, outcome, reads=True) is None, segments
        assert outcome.statuses == [299] * len(stream.requests), segments
