"""Bodies of requests.  In: a request.  Out: its bytes, within a size, a time, and a sum over all that are held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from starlette.requests import Request

from zinfer.config.schema import Serve
from zinfer.serving.refusal import Refusal


class ClientGone(Exception):  # noqa: N818  # no error of anyone's
    """The client left: nobody waits for an answer."""


class Bodies:
    """Bytes of bodies that are held at this moment.  Used from the event loop's thread."""

    def __init__(self, limits: Serve) -> None:
        self.limits = limits
        self.held_bytes = 0

    @asynccontextmanager
    async def reading(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, counted until the block ends.

        Raises Refusal 415 ZI-1175 for another type than JSON, 413 ZI-1178 for too many bytes, 429 ZI-2211 where
        other bodies leave no room, 408 ZI-1182 for one that does not arrive, ClientGone.
        """
        check_type(request)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal():
            self._check_one(int(declared))
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(self.limits.body_s):
                    async for piece in _pieces(request):
                        self._check_one(len(body) + len(piece))
                        self._check_all(len(piece))
                        body += piece
                        self.held_bytes += len(piece)
            except TimeoutError:
                raise Refusal(
                    408,
                    "ZI-1182",
                    f"the body was not there {self.limits.body_s:g} s after its headers",
                    remedy="send it at once, or serve with --set serve.body_s=60",
                    closes=True,
                ) from None
            yield bytes(body)
        finally:
            self.held_bytes -= len(body)

    def has_room(self, size: int) -> bool:
        """Whether a body of so many bytes may be held now."""
        return size <= self.limits.max_body and self.held_bytes + size <= self.limits.max_bodies

    @contextmanager
    def holding(self, body: bytes) -> Iterator[None]:
        """Count a body that is there, until the block ends."""
        self.held_bytes += len(body)
        try:
            yield
        finally:
            self.held_bytes -= len(body)

    def _check_one(self, size: int) -> None:
        if size > self.limits.max_body:
            raise Refusal(
                413,
                "ZI-1178",
                f"the body has {size} bytes or more, at most {self.limits.max_body} are taken",
                remedy=f"send fewer texts at a time, or serve with --set serve.max_body={size}",
            )

    def _check_all(self, size: int) -> None:
        if self.held_bytes + size > self.limits.max_bodies:
            raise Refusal(
                429,
                "ZI-2211",
                f"bodies of {self.held_bytes} bytes are held, {self.limits.max_bodies} may be",
                remedy="ask again after 1 s",
                retry_after_s=1,
            )


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        more = message.get("more_body", False)


def check_type(request: Request) -> None:
    """Raises Refusal 415 ZI-1175.  Asking for the type also keeps web pages from posting here behind a user's back."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if kind != "application/json" or coding != "identity":
        raise Refusal(
            415,
            "ZI-1175",
            f"a body of type application/json was wanted, {(kind or 'none')[:60]!r} ({coding[:20]}) came",
            remedy="curl -H 'Content-Type: application/json' ...",
        )
