"""Plain requests need no parser.  In: what one read of a connection brought.  Out: a request, a 429, or neither.

A pass of a small model takes less than parsing a request and finding its route, and under a great overload nearly all
that a server does is to refuse.  The slow twin is the way through parser and routes, which sees whatever is not taken
here, and answers and refuses for the same reasons in the same words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeAlias

from zinfer.serving.asks import Kind
from zinfer.serving.desk import Desk, Reply
from zinfer.serving.refusal import Refusal
from zinfer.serving.service import full

Headers: TypeAlias = Iterable[tuple[bytes, bytes]]
_LINES: dict[bytes, Kind] = {b"POST /predict HTTP/1.1": "predict", b"POST /embed HTTP/1.1": "embed"}
# Names and values that need no second thought; whatever else there may be is for the parser.
_PLAIN = re.compile(rb"(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e]*)+")
# These change what comes next.
_NOT_HERE = frozenset({b"connection", b"expect", b"transfer-encoding", b"upgrade"})


@dataclass(frozen=True, slots=True)
class Post:
    """One whole request: what is asked, its headers, its body."""

    kind: Kind
    headers: Mapping[bytes, bytes]
    body: bytes

    @property
    def path(self) -> str:
        """As the counters have it."""
        return f"/{self.kind}"

    @property
    def authorization(self) -> str | None:
        """The header."""
        found = self.headers.get(b"authorization")
        return None if found is None else found.decode("latin-1")

    @property
    def is_json(self) -> bool:
        """Whether there is nothing to ask about the type of the body; the routes know other ways to say so."""
        return (
            self.headers.get(b"content-type") == b"application/json"
            and b"content-encoding" not in self.headers
        )


class Door:
    """Stands before the parser of every connection.  Used from the event loop's thread."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.service = desk, desk.service

    def look(self, data: bytes) -> Post | Refusal | None:
        """`data` if it is one whole request that may be answered at once, or the refusal of one that finds no room.

        None: the parser shall see it.
        """
        post = whole_post(data)
        if post is None or self._has_another_fault(post):
            return None
        if (refusal := self.service.lack_of_room()) is not None:
            self.desk.count(post.path, refusal.status, 0.0)
            return refusal
        return post if post.is_json and self.desk.bodies.has_room(len(post.body)) else None

    def turned_away(self) -> Refusal:
        """Why a connection is closed that is one too many."""
        refusal = full("as many are connected as may be", 1)
        refusal.closes = True
        self.desk.count("other", refusal.status, 0.0)
        return refusal

    def _has_another_fault(self, post: Post) -> bool:
        """Whether the routes would refuse it before they ask for room."""
        try:
            self.service.check_key(post.authorization)
            self.service.check_open()
            self.service.check_kind(post.kind)
        except Refusal:
            return True
        return False


def whole_post(data: bytes) -> Post | None:
    """The request that these bytes are, from its first byte to its last.

    None for all else: several requests, a part of one, other paths, anything that is not as plain as can be.
    """
    head, end, body = data.partition(b"\r\n\r\n")
    line, _, rest = head.partition(b"\r\n")
    kind = _LINES.get(line)
    if kind is None or not end or not _PLAIN.fullmatch(head, len(line)):
        return None
    pairs = [one.partition(b":") for one in rest.split(b"\r\n")]
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if len(headers) < len(pairs) or b"host" not in headers or _NOT_HERE & headers.keys():
        return None
    length = headers.get(b"content-length", b"")
    if not length.isdigit() or int(length) != len(body):
        return None
    return Post(kind, headers, body)


def written(reply: Reply, usual: Headers) -> bytes:
    """The response as it is sent; `usual` are the headers of every response."""
    own = {"content-length": str(len(reply.body)), "content-type": "application/json", **reply.headers}
    lines = [b"%s: %s\r\n" % pair for pair in usual]
    lines += [f"{name}: {value}\r\n".encode() for name, value in own.items()]
    first = b"HTTP/1.1 %d %s\r\n" % (reply.status, HTTPStatus(reply.status).phrase.encode())
    return b"%s%s\r\n%s" % (first, b"".join(lines), reply.body)
