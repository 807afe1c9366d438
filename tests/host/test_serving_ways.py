"""The short way past the parser and the long one by the routes: one answer, and nothing left behind by either."""

import json

import pytest
from raw_http import HEAD, by_way, parsed, read_all, read_one, request, until
from serving_doubles import listening
from uvicorn.protocols.http.h11_impl import H11Protocol

from zinfer.errors import IntegrityError, UsageError
from zinfer.serving.desk import Desk, Reply

PREDICT = HEAD.replace(b"/embed", b"/predict")


def refuses_texts(_texts, _direction):
    raise UsageError("ZI-1132", "text 0 has no token", remedy="leave it out")


def raises(_texts, _direction):
    raise ZeroDivisionError


CASES = {
    "vectors": (HEAD, b'{"inputs": ["abc", "d"]}', None, 200),
    "labels": (PREDICT, b'{"texts": ["abc", ["d", "e"]], "top_k": 1}', None, 200),
    "not JSON": (HEAD, b"{", None, 400),
    "another shape": (HEAD, b'{"input": "abc"}', None, 422),
    "cut": (HEAD, b'{"inputs": "abcdefghij", "truncate": false}', None, 413),
    "too much for any queue": (HEAD, b'{"texts": ["abcdefgh", "abcdefgh"]}', None, 413),
    "another type": (HEAD.replace(b"/json", b"/xml"), b"<a/>", None, 415),
    "a full queue": (HEAD, b'{"inputs": "abcd"}', lambda site: setattr(site.queue, "max_queue_tokens", 3), 429),
    "a pass that fails": (
        HEAD,
        b'{"inputs": "a"}',
        lambda site: setattr(site.queue, "error", IntegrityError("ZI-6001", "/secret", remedy="verify")),
        424,
    ),
    "no token": (HEAD, b'{"inputs": "a"}', lambda site: setattr(site.model, "encode", refuses_texts), 422),
    "a bug": (HEAD, b'{"inputs": "a"}', lambda site: setattr(site.model, "encode", raises), 500),
    "no head": (PREDICT, b'{"inputs": "a"}', lambda site: setattr(site.model, "labels", ()), 424),
}  # fmt: skip


@pytest.fixture
def ways(monkeypatch):
    """How many requests the parser saw."""
    seen, receive = [], H11Protocol.data_received
    monkeypatch.setattr(H11Protocol, "data_received", lambda *own: seen.append(1) or receive(*own))
    return seen


def answered_by(way, case, ways):
    """(status, headers, body, counters) of a request that comes one way."""
    head, body, fault, _ = CASES[case]
    with listening(queue_tokens=12) as here:
        if fault is not None:
            fault(here.site)
        ways.clear()
        with here.connect() as connection:
            connection.sendall(by_way(way, request(body, head)))
            status, headers, found = read_one(connection)
        until(lambda: not here.site.service.in_flight)
        assert here.site.app.desk.bodies.held_bytes == 0
        lines = here.site.app.desk.meters.text().decode().splitlines()
        counters = [line for line in lines if line.startswith("zinfer_") and "_total" in line]
    headers.pop("date")
    return status, headers, found, counters


@pytest.mark.parametrize("case", CASES)
def test_the_short_way_answers_as_the_routes_do(case, ways):
    short = answered_by("door", case, ways)
    is_short = case not in ("another type", "no head")
    assert len(ways) == (0 if is_short else 1), "what it is about: the parser saw nothing of it"
    long = answered_by("routes", case, ways)
    assert len(ways) == 1
    assert short[0] == CASES[case][3]
    if case == "a full queue":  # when exactly it should have room is another moment's
        assert short[2].keys() == long[2].keys()
        short, long = short[:1], long[:1]
    assert short == long


def test_a_reply_that_differs_would_be_noticed(ways, monkeypatch):
    """The mutation of the test above."""

    async def other(self, raw, kind):
        return Reply(200, b"{}")

    long = answered_by("routes", "vectors", ways)
    monkeypatch.setattr(Desk, "reply", other)
    assert answered_by("door", "vectors", ways) != long


def test_what_comes_while_an_answer_is_given_waits_for_it(ways):
    with listening() as here, here.connect() as connection:
        here.site.queue.is_open = False
        connection.sendall(request())
        until(lambda: here.site.queue.waiting)
        (served,) = here.server.server_state.connections
        second = request(b'{"inputs": ["a", "b"]}', HEAD + b"connection: close\r\n")
        connection.sendall(second[:20])
        until(lambda: served._early)
        assert not served.transport.is_reading(), "no more is held than one read brings"
        connection.sendall(second[20:])
        here.site.queue.is_open = True
        here.site.queue.answer()
        first, last = read_all(connection).split(b"HTTP/1.1 200 OK")[1:]
    assert [len(parsed(b"HTTP/1.1 200 OK" + raw)[2]) for raw in (first, last)] == [1, 2], "in their order"
    assert len(ways) >= 1, "a request that came in pieces is for the parser"


def test_a_client_that_leaves_takes_its_texts_along(ways):
    with listening() as here:
        here.site.queue.is_open = False
        with here.connect() as connection:
            connection.sendall(request())
            until(lambda: here.site.queue.waiting)
        until(lambda: not here.site.queue.waiting)
        until(lambda: not here.site.service.in_flight)
        assert (here.site.queue.cancelled, here.site.queue.answered) == (1, 1), "the first was to warm it"
        assert here.site.app.desk.meters.disconnects._value.get() == 1
        assert here.site.app.desk.bodies.held_bytes == 0
    assert not ways


def test_a_server_that_ends_closes_behind_the_answer(ways):
    with listening(grace_s=30) as here, here.connect() as connection:
        here.site.queue.is_open = False
        connection.sendall(request())
        until(lambda: here.site.queue.waiting)
        (served,) = here.server.server_state.connections
        served.loop.call_soon_threadsafe(served.shutdown)  # what uvicorn does once nothing more is taken
        until(lambda: served._closes)
        here.site.queue.answer()
        status, headers, _ = parsed(read_all(connection))
        assert (status, headers["connection"]) == (200, "close")
    assert not ways


def test_bodies_that_are_held_leave_the_next_to_the_routes(ways):
    with listening(max_bodies=30) as here, here.connect() as first, here.connect() as second:
        here.site.queue.is_open = False
        first.sendall(request())
        until(lambda: here.site.queue.waiting)
        assert here.site.app.desk.bodies.held_bytes == len(json.dumps({"inputs": "abc"}))
        second.sendall(request())
        status, _, error = read_one(second)
        assert (status, error["code"]) == (429, "ZI-2211")
        here.site.queue.answer()
        assert read_one(first)[0] == 200
    assert len(ways) == 1
