"""HTTP/1.1 with a clock and a door.  In: a connection's bytes.  Out: replies, or uvicorn's requests; trash is refused.

uvicorn waits for headers for ever, answers trash in plain text and parses what is plain to see; all three are amended
here, in a subclass.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from zinfer.config.schema import Serve
from zinfer.serving.desk import Reply
from zinfer.serving.door import Door, Post, written
from zinfer.serving.refusal import Refusal

MAX_HEADER_BYTES = 16 * 1024
LINGER_S = (
    5.0  # how long the rest of a refused body is read and thrown away, so that its sender sees the refusal
)


def timed_protocol(limits: Serve, own_door: Door) -> type[H11Protocol]:
    """The protocol with these limits: uvicorn makes one instance per connection."""

    class Timed(TimedProtocol):
        """With the limits of this server."""

        door = own_door
        max_connections = limits.max_connections
        header_s = limits.header_s
        idle_s = limits.idle_s

    return Timed


class Gathered:
    """A transport that sends what is written in one turn of the event loop as one piece.

    Head and body of a response are written one after the other; every piece that is sent gives up Python's lock, and
    under load getting it back takes longer than all the rest of a response.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send it with what else is written in this turn, or at the next `flush`."""
        if not self._pieces:
            self._loop.call_soon(self.flush)
        self._pieces.append(data)

    def flush(self) -> None:
        """Send what was written."""
        pieces, self._pieces = self._pieces, []
        if pieces and not self._transport.is_closing():
            self._transport.write(b"".join(pieces))

    def write_eof(self) -> None:
        """Send what was written, and no more."""
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Close behind what was written."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class TimedProtocol(H11Protocol):
    """A request's headers are whole `header_s` after their first byte; before it a connection may idle `idle_s`.

    What `door` takes or refuses needs no parser; one request at a time, what comes meanwhile waits.  A connection
    beyond `max_connections` gets a 429 and its end.
    """

    door: Door
    max_connections: int
    _gathered: Gathered
    header_s = 10.0
    idle_s = 75.0
    _timer: asyncio.TimerHandle | None = None
    _is_turned_away = False
    _answering: asyncio.Task[None] | None = None  # a request that came by the door
    _early = b""  # what came meanwhile
    _closes = False  # behind that request's answer

    def connection_made(self, transport: Any) -> None:
        """The first request may take as long to begin as any later one."""
        self._gathered = Gathered(transport, self.loop)
        super().connection_made(self._gathered)  # type: ignore[arg-type]  # all that is asked of a transport
        if len(self.connections) > self.max_connections:
            self._turn_away()
            return
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """Begin the clock with a request's first byte, stop it with its headers' last."""
        if self._is_turned_away:
            return
        if self._answering is not None:
            self._early += data
            self.flow.pause_reading()
            return
        found = self.door.look(data) if self._is_between_requests() else None
        if isinstance(found, Refusal):
            self._send(Reply.refusing(found))
            return
        if found is not None:
            self._take(found)
            return
        if self._timer is None and self.conn.their_state is h11.IDLE:
            self._timer = self.loop.call_later(self.header_s, self._headers_are_late)
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is timed any more, and nobody waits for an answer."""
        self._stop()
        if self._answering is not None:
            self._answering.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close, behind the answer that is being given."""
        if self._answering is None:
            super().shutdown()
        self._closes = True

    def on_response_complete(self) -> None:
        """A body that was refused unread may still come for a while."""
        self._gathered.flush()
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self.loop.call_later(LINGER_S, self._end_unread, self.cycle)

    def send_400_response(self, msg: str) -> None:
        """431 for headers that are too long, 400 for other trash, with the same body as any refusal."""
        is_long = len(self.conn.trailing_data[0]) > MAX_HEADER_BYTES
        status, what = (431, f"headers of more than {MAX_HEADER_BYTES} bytes") if is_long else (400, msg)
        self._refuse(Refusal(status, "ZI-1184", what, remedy="send HTTP/1.1 with few headers"))

    def _take(self, post: Post) -> None:
        self._unset_keepalive_if_required()
        self._answering = self.loop.create_task(self._answer(post))
        self._answering.add_done_callback(self.tasks.discard)
        self.tasks.add(self._answering)

    async def _answer(self, post: Post) -> None:
        try:
            reply = await self.door.desk.reply(post.body, post.kind)
        except asyncio.CancelledError:  # the client has gone, or the server will not wait
            self.transport.close()
            raise
        finally:
            self._answering = None
        if not self.transport.is_closing():
            self._send(reply)
            self.flow.resume_reading()
            early, self._early = self._early, b""
            if early:
                self.data_received(early)

    def _send(self, reply: Reply) -> None:
        """Write a reply past the parser, which has seen nothing of its request."""
        if self._closes:
            reply = replace(reply, headers={**reply.headers, "connection": "close"})
        self.transport.write(written(reply, self.server_state.default_headers))
        self._gathered.flush()
        if reply.closes:
            self.transport.close()
            return
        self._await_request()

    def _refuse(self, refusal: Refusal) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is half-way out
            self.transport.close()
            return
        body = refusal.body()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=refusal.status, headers=headers, reason=b""),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_request(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.idle_s, self.timeout_keep_alive_handler)

    def _is_between_requests(self) -> bool:
        """Nothing of an earlier request is left, its answer has been read, and nothing of another has come."""
        is_idle = self.conn.states == {h11.CLIENT: h11.IDLE, h11.SERVER: h11.IDLE}
        return is_idle and not self.conn.trailing_data[0] and not self.flow.write_paused

    def _turn_away(self) -> None:
        """Say so at once and read no more; closing before the request has come would lose what was said."""
        self._is_turned_away = True
        self.transport.write(
            written(Reply.refusing(self.door.turned_away()), self.server_state.default_headers)
        )
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _headers_are_late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse(
                Refusal(
                    408,
                    "ZI-1182",
                    f"headers were not whole {self.header_s:g} s after their first byte",
                    remedy="send them at once, or serve with --set serve.header_s=60",
                )
            )

    def _end_unread(self, cycle: RequestResponseCycle) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.close()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
