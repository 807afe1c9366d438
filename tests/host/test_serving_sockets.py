"""The server over real sockets, with doubles behind it: slow and rude clients, and its end."""

import re
import signal
import socket
import threading
import time
from contextlib import ExitStack

import httpx2
import pytest
from raw_http import BODY, HEAD, by_way, parsed, read_all, read_one, request, until
from serving_doubles import listening
from uvicorn.protocols.http.h11_impl import H11Protocol

from zinfer.serving import protocol


@pytest.fixture(scope="module")
def here():
    with listening(header_s=0.3, body_s=0.3, max_body=2000) as opened:
        yield opened


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (HEAD, 408, "ZI-1182"),
        (b"P", 408, "ZI-1182"),
        (HEAD + b"content-length: 17\r\n\r\n" + BODY[:5], 408, "ZI-1182"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n" + BODY[:5] + b"\r\n", 408, "ZI-1182"),
        (b"no http at all\r\n\r\n", 400, "ZI-1184"),
        (HEAD + b"x: " + b"y" * 20_000, 431, "ZI-1184"),
        (HEAD + b"x: y\r\n" * 4000, 431, "ZI-1184"),
        (HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", 400, "ZI-1184"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400, "ZI-1184"),
    ],
)
def test_slow_and_broken_requests_get_a_status_and_the_connection_ends(here, sent, status, code):
    with here.connect() as connection:
        connection.sendall(sent)
        found, headers, error = parsed(read_all(connection))
    assert (found, error["code"]) == (status, code)
    assert headers["connection"] == "close"
    until(lambda: not here.site.service.in_flight)


def test_a_connection_may_idle_for_longer_than_headers_may_take():
    with listening(header_s=0.02, idle_s=60) as here, here.connect() as connection:
        for _ in range(2):
            time.sleep(0.1)  # nothing was begun
            connection.sendall(request())
            assert read_one(connection)[0] == 200


def test_a_silent_connection_is_closed():
    with listening(idle_s=0.1) as here, here.connect() as silent:
        assert read_all(silent) == b""


def test_after_an_answer_a_connection_may_idle_as_long_again():
    with listening(idle_s=60) as here, here.connect() as connection:
        connection.sendall(request())
        assert read_one(connection)[0] == 200
        (served,) = here.server.server_state.connections
        until(lambda: served.timeout_keep_alive_task is not None)
        assert 0 < served.timeout_keep_alive_task.when() - served.loop.time() <= 60
        served.loop.call_soon_threadsafe(served.timeout_keep_alive_handler)
        assert read_all(connection) == b"", "and after its idle time it is closed"


def test_small_answers_are_sent_at_once(here):
    """Without this option an answer waits for its reader's acknowledgement of the headers before it."""
    with here.connect():
        until(lambda: here.server.server_state.connections)
        (connection,) = here.server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    until(lambda: not here.server.server_state.connections)


@pytest.mark.parametrize("way", ["door", "routes"])
def test_an_answer_is_sent_as_one_piece(here, monkeypatch, way):
    sent, own = [], protocol.Gathered.flush

    def noted(self):
        if self._pieces:
            sent.append(len(self._pieces))
        own(self)

    monkeypatch.setattr(protocol.Gathered, "flush", noted)
    with here.connect() as connection:
        connection.sendall(by_way(way, request()))
        assert read_one(connection)[0] == 200
    assert len(sent) == 1, "head and body together"
    assert (sent[0] > 1) == (way == "routes"), "though uvicorn writes them one after the other"


def test_the_clock_of_headers_starts_anew_with_each_request(here):
    with here.connect() as connection:
        connection.sendall(request())
        assert read_one(connection)[0] == 200
        connection.sendall(HEAD)
        assert parsed(read_all(connection))[0] == 408


def test_requests_may_come_together(here):
    with here.connect() as connection:
        last = request(b"x", HEAD + b"connection: close\r\n")
        connection.sendall(request() + request(b'{"inputs": ["a", "b"]}') + last)
        raw = read_all(connection)
    assert raw.count(b"HTTP/1.1 200") == 2
    assert raw.count(b"HTTP/1.1 400") == 1


def test_the_rest_of_a_refused_body_is_read_so_that_its_sender_sees_why(here):
    with here.connect() as connection:
        connection.sendall(HEAD + b"content-length: 600000\r\n\r\n" + b"x" * 300_000)
        assert read_one(connection)[2]["code"] == "ZI-1178"
        connection.sendall(b"x" * 300_000)
        connection.sendall(request())
        assert read_one(connection)[0] == 200, "and the connection is of use afterwards"


def test_the_rest_of_a_refused_body_is_not_awaited_for_ever(here, monkeypatch):
    monkeypatch.setattr("zinfer.serving.protocol.LINGER_S", 0.2)
    with here.connect() as connection:
        connection.sendall(HEAD + b"content-length: 600000\r\n\r\nx")
        raw = read_all(connection)
    assert parsed(raw)[2]["code"] == "ZI-1178"


def test_many_rude_clients_leave_nothing(here):
    """Connections cut at every point of a request."""
    raw, meters = request(), here.site.app.desk.meters
    before = meters.disconnects._value.get()
    here.site.queue.is_open = False
    for cut in range(0, len(raw) + 1, 7):
        with here.connect() as connection:
            connection.sendall(raw[:cut])
    for _ in range(10):
        with here.connect() as connection:
            connection.sendall(raw)
            until(lambda: here.site.queue.waiting)
        until(lambda: not here.site.queue.waiting)
    until(lambda: not here.site.service.in_flight)
    here.site.queue.is_open = True
    assert meters.disconnects._value.get() >= before + 10
    assert here.site.queue.cancelled >= 10
    assert httpx2.post(f"{here.about['url']}/embed", json={"inputs": "a"}).status_code == 200


def test_hundreds_of_connections_at_once(here, monkeypatch):
    """However long each takes on a machine that is busy: refusing for that is another test's matter."""
    monkeypatch.setattr("zinfer.serving.service._MOST_BEFORE_S", float("inf"))
    with ExitStack() as stack:
        opened = [stack.enter_context(here.connect()) for _ in range(300)]
        for connection in opened:
            connection.sendall(request())
        assert {read_one(connection)[0] for connection in opened} == {200}
    until(lambda: not here.server.server_state.connections)


def in_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    return thread, found


def test_the_end_answers_what_was_taken_and_refuses_what_comes():
    with listening(grace_s=30) as here:
        here.site.queue.is_open = False
        url, held = here.about["url"], []
        with httpx2.Client() as early, here.connect() as kept:
            thread, held = in_thread(lambda: early.post(f"{url}/embed", json={"inputs": "abc"}, timeout=30))
            until(lambda: here.site.queue.waiting)
            here.end()
            kept.sendall(request())
            status, headers, error = parsed(read_all(kept))
            assert (status, error["code"]) == (503, "ZI-2212")
            assert (headers["connection"], headers["retry-after"]) == ("close", "30")
            assert httpx2.get(f"{url}/ready").status_code == 503
            assert httpx2.get(f"{url}/health").status_code == 200
            assert here.thread.is_alive()
            assert not held
            here.site.queue.answer()
            thread.join(30)
        here.thread.join(30)
        assert not here.thread.is_alive()
        assert held[0].status_code == 200
        assert here.server.failure is None
    assert here.said == ["SIGTERM: answering 1 requests, then the end"]


def test_a_signal_writes_nothing_itself():
    """It may have come in the middle of a line, where the stream can take no other."""
    from serving_doubles import Listening

    here = Listening()
    here.server.handle_exit(signal.SIGTERM, None)
    assert (here.said, here.site.service.is_draining) == ([], True)
    here.site.service.close()
    here.socket.close()


@pytest.mark.parametrize("again", [False, True])
def test_an_end_that_takes_too_long_says_what_was_cut_off(again):
    with listening(grace_s=0.2 if not again else 60) as here:
        here.site.queue.is_open = False
        with here.connect() as connection:
            connection.sendall(request())
            until(lambda: here.site.queue.waiting)
            here.end()
            if again:
                here.end()  # whoever sends a second signal means it
            here.thread.join(30)
            assert not here.thread.is_alive()
        if not again:
            assert here.server.failure.code == "ZI-5354"
            assert "1 requests" in here.server.failure.message
        assert here.site.service.in_flight == 0


def test_a_model_that_does_not_load_ends_the_server():
    from serving_doubles import Listening

    from zinfer.errors import IntegrityError

    here = Listening()
    here.site.queue.error = IntegrityError("ZI-6001", "block 3", remedy="zinfer verify")
    here.thread.start()
    here.thread.join(30)
    here.site.service.close()
    here.socket.close()
    assert here.server.failure.code == "ZI-6001"
    assert not here.is_ready.is_set()


def refused_by(way, raw, monkeypatch):
    """Status, headers and body of a request that finds no room, by the door or by the routes."""
    parsed_by, receive = [], H11Protocol.data_received
    monkeypatch.setattr(H11Protocol, "data_received", lambda *own: parsed_by.append(1) or receive(*own))
    with listening() as site:
        site.site.service._room_at_s = time.perf_counter() + 1000
        raw = by_way(way, raw)
        with site.connect() as connection:
            for _ in range(3):
                connection.sendall(raw)
                found = read_one(connection)
            text = site.site.app.desk.meters
            counts = text.requests.labels("/embed", "429"), text.rejected.labels("overloaded")
            until(lambda: [count._value.get() for count in counts] == [3, 3])
            site.site.service._room_at_s = 0.0
            connection.sendall(request())
            assert read_one(connection)[0] == 200, "the connection goes on"
        monkeypatch.undo()
        assert len(parsed_by) == (0 if way == "door" else 3), "the door needs no parser, the routes do"
        return found


def test_the_door_refuses_as_the_routes_do(monkeypatch):
    """The fast path and its slow twin: the same status, headers and words, seconds apart."""
    fast, slow = (refused_by(way, request(), monkeypatch) for way in ("door", "routes"))
    assert fast[0] == slow[0] == 429
    for _, headers, body in (fast, slow):
        assert 900 < body.pop("retry_after_s") <= 1000
        assert re.fullmatch(r"ask again after \d+\.\d{3} s", body.pop("remedy"))
        assert 900 < int(headers.pop("retry-after")) <= 1000
        assert int(headers.pop("content-length")) > 0
        headers.pop("date")
    assert fast[1:] == slow[1:]


def test_a_connection_too_many_is_told_so_and_closed(monkeypatch):
    monkeypatch.setattr("zinfer.serving.protocol.LINGER_S", 0.2)
    with listening(max_connections=2) as site, ExitStack() as stack:
        kept = [stack.enter_context(site.connect()) for _ in range(2)]
        for connection in kept:
            connection.sendall(request())
            assert read_one(connection)[0] == 200
        with site.connect() as third:
            third.sendall(request())
            status, headers, body = parsed(read_all(third))
        assert (status, headers["connection"], body["code"]) == (429, "close", "ZI-2210")
        assert headers["retry-after"] == "1"
        for connection in kept:
            connection.sendall(request())
            assert read_one(connection)[0] == 200, "those that were there go on"
        kept[0].close()
        until(lambda: len(site.server.server_state.connections) < 2)
        with site.connect() as fourth:
            fourth.sendall(request())
            assert read_one(fourth)[0] == 200, "and their places are free again"
