"""Whatever is asked of chunks in shares, in whatever order, and whatever fails: no byte, slot or book is lost."""

import threading

import chunk_files
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from links_of import with_links

from zinfer.errors import InternalError, MachineError
from zinfer.memory import sim_shares
from zinfer.memory.assemble import open_manager
from zinfer.parallel.aggregate import by_several_links
from zinfer.plan.records import Budget, Tier

PAGES = [2, 6, 1, 4, 3]
chunks = st.integers(0, len(PAGES) - 1)


class Faults:
    """Makes the next copy over a lane fail, once."""

    def __init__(self):
        self.lane = None
        self.real = sim_shares.sleep_until

    def __call__(self, due_s):
        lane = threading.current_thread().name.removeprefix("zinfer-").rpartition("_")[0]
        if lane == self.lane:
            self.lane = None
            raise RuntimeError(f"{lane} went away")
        self.real(due_s)


class Shares(RuleBasedStateMachine):
    """A manager over three links, with fewer slots than chunks."""

    folder = None  # set by the test

    def __init__(self):
        super().__init__()
        self.faults = sim_shares.sleep_until = Faults()
        self.leases = []

    @initialize(weights=st.lists(st.integers(1, 5), min_size=2, max_size=4))
    def open(self, weights):
        self.table, self.contents = chunk_files.write_chunks(self.folder, PAGES)
        machine = with_links(chunk_files.FAST, [weight * 1e12 for weight in weights])
        placement = chunk_files.sim_placement(self.table, (0,), (1,), 2, 1)
        needs = [chunk_files.needed_bytes(self.table, placement, tier) for tier in (Tier.HOST, Tier.DEVICE)]
        make = by_several_links(self.table, placement, Budget(*needs), machine, "sim")
        self.lanes = [
            lane for at in range(len(weights)) for lane in ([f"h2d:{at}", f"peer:{at}"] if at else ["h2d"])
        ]
        self.manager = open_manager(
            self.table, placement, Budget(*needs), device="sim", machine=machine, make_transfer=make
        )

    @rule(number=chunks)
    def prefetch(self, number):
        try:
            self.manager.prefetch(number)
        except InternalError as error:
            assert "ZI-5401" in str(error)  # no slot is free, and the policy names no victim

    @rule(number=chunks)
    def evict(self, number):
        if all(lease.chunk != number for lease in self.leases):
            self.manager.evict(number)

    @rule(number=chunks)
    def lease(self, number):
        try:
            lease = self.manager.lease(number)
        except MachineError as error:
            assert "went away" in str(error)
            return
        except InternalError as error:
            assert "ZI-5401" in str(error)
            return
        assert chunk_files.bytes_of(lease, self.table.chunks[number]) == self.contents[number]
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule()
    def release(self):
        self.leases.pop(0).release()

    @rule(data=st.data())
    def break_a_link(self, data):
        self.faults.lane = data.draw(st.sampled_from(self.lanes))

    @invariant()
    def books_balance(self):
        if hasattr(self, "manager"):
            self.manager.check()
            for lease in self.leases:
                assert (
                    chunk_files.bytes_of(lease, self.table.chunks[lease.chunk]) == self.contents[lease.chunk]
                )

    def teardown(self):
        self.faults.lane = None
        try:
            if hasattr(self, "manager"):
                for lease in self.leases:
                    lease.release()
                self.manager.drop_streamed()
                transfer = self.manager.transfer
                self.manager.close()
                for at, helper in transfer._helpers.items():
                    assert transfer._slots[at].qsize() == helper.num_slots, "every place came back"
                assert len(transfer._free) == 1, "the staging slot came back"
        finally:
            sim_shares.sleep_until = self.faults.real


def test_shares_under_any_order_and_any_failing_link(tmp_path):
    Shares.folder = tmp_path
    run = type(
        "Run",
        (Shares.TestCase,),
        {"settings": settings(max_examples=30, stateful_step_count=20, deadline=None)},
    )
    run("runTest").runTest()
