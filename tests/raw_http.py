"""A client that writes requests byte by byte and reads whole responses."""

import json
import re
import time

HEAD = b"POST /embed HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
BODY = b'{"inputs": "abc"}'


def request(body=BODY, head=HEAD):
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def by_way(way, raw):
    """A request that the door takes; or with a header that is for the routes, and changes nothing."""
    return raw if way == "door" else raw.replace(b"\r\n\r\n", b"\r\nconnection: keep-alive\r\n\r\n", 1)


def read_all(connection):
    """Everything until the server closes."""
    found = b""
    while piece := connection.recv(65536):
        found += piece
    return found


def parsed(raw):
    """(status, headers, body) of the first response in `raw`."""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(first.split()[1]), headers, json.loads(body[: int(headers["content-length"])])


def read_one(connection):
    """One whole response, parsed."""
    found = b""
    while True:
        head, end, body = found.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head) if end else None
        if length and len(body) >= int(length[1]):
            return parsed(found)
        piece = connection.recv(65536)
        assert piece, found
        found += piece


def until(is_so):
    for _ in range(2000):
        if is_so():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to be")
