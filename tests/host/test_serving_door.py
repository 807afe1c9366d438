"""What the door takes for a whole request: nothing that the parser would read otherwise."""

import time

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_doubles import site

from zinfer.serving.desk import Reply
from zinfer.serving.door import Door, whole_post, written
from zinfer.serving.refusal import Refusal

BODY = b'{"inputs": "abc"}'


def post(body=BODY, line=b"POST /embed HTTP/1.1", headers=(), length=None):
    own = [b"host: here", b"content-type: application/json", *headers]
    own += [b"content-length: %d" % (len(body) if length is None else length)]
    return b"\r\n".join([line, *own, b"", body])


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (post(), ("embed", None)),
        (post(line=b"POST /predict HTTP/1.1"), ("predict", None)),
        (post(b""), ("embed", None)),
        (post(headers=[b"Authorization: Bearer x"]), ("embed", "Bearer x")),
        (post().replace(b"host", b"HOST"), ("embed", None)),
        (post(b'{"inputs": "\r\n\r\n"}'), ("embed", None)),
    ],
)
def test_a_plain_request_is_known_at_a_glance(data, found):
    post = whole_post(data)
    assert (post.kind, post.authorization) == found
    assert data.endswith(b"\r\n\r\n" + post.body)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        post()[:-1],
        post() + b"x",
        post() + post(),
        post(line=b"GET /embed HTTP/1.1"),
        post(line=b"POST /embed HTTP/1.0"),
        post(line=b"POST /other HTTP/1.1"),
        post(line=b"POST /embed?x=1 HTTP/1.1"),
        post(length=3),
        post(headers=[b"content-length: 17"]),
        post(headers=[b"transfer-encoding: chunked"]),
        post(headers=[b"Expect: 100-continue"]),
        post(headers=[b"connection: close"]),
        post(headers=[b"upgrade: websocket"]),
        post(headers=[b"no colon"]),
        post(headers=[b": no name"]),
        post(headers=[b"a b: space"]),
        post(headers=[b" folded: line"]),
        post(headers=[b"x: \x00"]),
        post(headers=[b"x: \n y"]),
        post().replace(b"host: here\r\n", b""),
        post().replace(b"content-length: 17", b"content-length: +17"),
        post().replace(b"\r\n", b"\n"),
    ],
)
def test_all_else_is_for_the_parser(data):
    assert whole_post(data) is None


PIECES = [
    b"POST ",
    b"/embed",
    b" HTTP/1.1",
    b"\r\n",
    b"\r\n\r\n",
    b"host: a",
    b"content-length: ",
    b"2",
    b"{}",
    b":",
    b" ",
    b"\n",
]


def as_the_parser_reads(data):
    """Events of h11 on one connection, None where it refuses them."""
    parser, events = h11.Connection(h11.SERVER), []
    parser.receive_data(data)
    try:
        while (event := parser.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            events.append(event)
    except h11.RemoteProtocolError:
        return None
    return events, parser.trailing_data[0]


@given(
    st.one_of(
        st.lists(st.sampled_from(PIECES), max_size=14).map(b"".join),
        st.tuples(st.binary(max_size=6), st.integers(0, 120), st.integers(0, 6)).map(
            lambda cut: post()[: cut[1]] + cut[0] + post()[cut[1] + cut[2] :]
        ),
    )
)
def test_what_the_door_takes_for_one_request_is_one_to_the_parser_too(data):
    found = whole_post(data)
    if found is None:
        return
    read = as_the_parser_reads(data)
    assert read is not None, "it would be refused for another reason"
    (request, *parts), rest = read
    assert request.target.decode() == found.path
    assert b"".join(bytes(part.data) for part in parts[:-1]) == found.body
    assert dict(request.headers) == found.headers
    assert isinstance(parts[-1], h11.EndOfMessage)
    assert rest == b""


class TestDoor:
    def test_with_room_nothing_is_refused(self):
        with site() as here:
            assert Door(here.app.desk).look(post()).body == BODY

    @pytest.mark.parametrize(
        ("fault", "found"),
        [
            (lambda here: None, 429),
            (lambda here: setattr(here.service, "is_draining", True), None),
            (lambda here: setattr(here.service, "is_warm", False), None),
            (lambda here: setattr(here.model, "labels", ()), None),
        ],
    )
    def test_other_faults_are_told_by_the_routes(self, fault, found):
        with site() as here:
            here.service._room_at_s = time.perf_counter() + 1000
            fault(here)
            refusal = Door(here.app.desk).look(post(line=b"POST /predict HTTP/1.1"))
            assert (refusal and refusal.status) == found
            counted = here.app.desk.meters.requests.labels("/predict", "429")._value.get()
            assert counted == (1 if found else 0)

    @pytest.mark.parametrize(("key", "found"), [(None, None), ("wrong", None), ("right", 429)])
    def test_strangers_are_not_told_how_full_it_is(self, key, found):
        with site(api_key="right") as here:
            here.service._room_at_s = time.perf_counter() + 1000
            headers = [] if key is None else [b"authorization: Bearer " + key.encode()]
            refusal = Door(here.app.desk).look(post(headers=headers))
            assert (refusal and refusal.status) == found

    def test_what_is_written_is_a_response(self):
        refusal = Refusal(429, "ZI-2210", "full", remedy="later", retry_after_s=1.5)
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
        parser.send(h11.EndOfMessage())
        parser.receive_data(written(Reply.refusing(refusal), [(b"date", b"now")]))
        head, body, end = (parser.next_event() for _ in range(3))
        assert (head.status_code, head.reason) == (429, b"Too Many Requests")
        assert (b"retry-after", b"2") in head.headers
        assert (b"date", b"now") in head.headers
        assert body.data == refusal.body()
        assert isinstance(end, h11.EndOfMessage)
