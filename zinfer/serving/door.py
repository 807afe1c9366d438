"""Refusals that cost no parser.  In: what one read of a connection brought.  Out: a 429; else the parser sees it.

Under a great overload nearly all that a server does is to refuse, so that has to cost next to nothing.  The slow twin
is the way through parser and routes, which refuses for the same reasons in the same words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

from zinfer.serving.asks import Kind
from zinfer.serving.refusal import Refusal
from zinfer.serving.service import Service, full

Headers: TypeAlias = Iterable[tuple[bytes, bytes]]
Count: TypeAlias = Callable[[str, Refusal], None]  # path, why
_LINES: dict[bytes, Kind] = {b"POST /predict HTTP/1.1": "predict", b"POST /embed HTTP/1.1": "embed"}
# Names and values that need no second thought; whatever else there may be is for the parser.
_PLAIN = re.compile(rb"(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e]*)+")
_NOT_HERE = frozenset(
    {b"connection", b"expect", b"transfer-encoding", b"upgrade"}
)  # they change what comes next


class Door:
    """Stands before the parser of every connection.  Used from the event loop's thread."""

    def __init__(self, service: Service, count: Count) -> None:
        self.service, self.count = service, count

    def refusal(self, data: bytes) -> Refusal | None:
        """The refusal of `data` where that is one whole request, and one that there is no room for."""
        if (refusal := self.service.lack_of_room()) is None:
            return None
        found = whole_post(data)
        if found is None or self._has_another_fault(*found):
            return None
        self.count(f"/{found[0]}", refusal)
        return refusal

    def turned_away(self) -> Refusal:
        """Why a connection is closed that is one too many."""
        refusal = full("as many are connected as may be", 1)
        refusal.closes = True
        self.count("other", refusal)
        return refusal

    def _has_another_fault(self, kind: Kind, authorization: str | None) -> bool:
        """Whether the routes would refuse it before they ask for room."""
        try:
            self.service.check_key(authorization)
            self.service.check_open()
            self.service.check_kind(kind)
        except Refusal:
            return True
        return False


def whole_post(data: bytes) -> tuple[Kind, str | None] | None:
    """(what is asked, its Authorization) of bytes that are one request from its first byte to its last.

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
    authorization = headers.get(b"authorization")
    return kind, None if authorization is None else authorization.decode("latin-1")


def written(refusal: Refusal, usual: Headers) -> bytes:
    """The response as it is sent; `usual` are the headers of every response."""
    body = refusal.body()
    own = {"content-length": str(len(body)), "content-type": "application/json"} | refusal.headers()
    lines = [b"%s: %s\r\n" % pair for pair in usual]
    lines += [f"{name}: {value}\r\n".encode() for name, value in own.items()]
    return b"HTTP/1.1 %d Too Many Requests\r\n%s\r\n%s" % (refusal.status, b"".join(lines), body)
