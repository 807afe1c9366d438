"""A response leaves the server in one piece, whatever its parts; nothing that was written is lost at an end."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from zinfer.serving.protocol import Gathered


class Wire:
    """What a transport was asked to do, in order."""

    def __init__(self):
        self.seen, self.is_open = [], True

    def write(self, data):
        assert self.is_open
        self.seen.append(data)

    def write_eof(self):
        self.seen.append("eof")

    def close(self):
        self.is_open = False
        self.seen.append("closed")

    def is_closing(self):
        return not self.is_open

    def get_extra_info(self, name):
        return f"the {name}"


def run(steps, *, turns=2):
    """Steps in one turn of a loop, then some turns more; what the wire saw before those and after."""

    async def main():
        wire = Wire()
        gathered = Gathered(wire, asyncio.get_running_loop())
        for step in steps:
            getattr(gathered, step[0])(*step[1:])
        before = list(wire.seen)
        for _ in range(turns):
            await asyncio.sleep(0)
        return before, wire.seen

    return asyncio.run(main())


def test_what_is_written_in_one_turn_is_one_piece():
    before, after = run([("write", b"head"), ("write", b"body"), ("write", b"")])
    assert (before, after) == ([], [b"headbody"]), "sent in the next turn at the latest"
    before, after = run([("write", b"head"), ("write", b"body"), ("flush",), ("write", b"more")])
    assert (before, after) == ([b"headbody"], [b"headbody", b"more"])


def test_what_ends_a_connection_comes_behind_what_was_written():
    assert run([("write", b"a"), ("write", b"b"), ("close",)])[1] == [b"ab", "closed"]
    assert run([("write", b"a"), ("write_eof",), ("write", b"b")])[1] == [b"a", "eof", b"b"]
    assert run([("close",), ("write", b"late")])[1] == ["closed"], "nobody is there to read that"


def test_all_else_is_the_transports_own():
    wire = Wire()
    loop = asyncio.new_event_loop()
    gathered = Gathered(wire, loop)
    assert gathered.get_extra_info("peername") == "the peername"
    assert not gathered.is_closing()
    wire.close()
    assert gathered.is_closing()
    loop.close()


@settings(max_examples=50)
@given(
    st.lists(
        st.one_of(st.binary(max_size=9).map(lambda data: ("write", data)), st.just(("flush",))), max_size=30
    )
)
def test_every_byte_is_sent_once_and_in_order(steps):
    _, after = run(steps)
    assert b"".join(after) == b"".join(step[1] for step in steps if step[0] == "write")
    assert len(after) <= 1 + sum(step[0] == "flush" for step in steps)
