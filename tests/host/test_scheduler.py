"""What a pass carries: no page twice, no request starved, every request ends exactly once, whatever is short."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from zinfer.errors import BudgetError, MachineError
from zinfer.kvcache.pages import PAGE_TOKENS, pages_for
from zinfer.runtime.batch import split_rows
from zinfer.runtime.request import Request
from zinfer.runtime.scheduler import Piece, Scheduler
from zinfer.sampling.params import SamplingParams


class FakePages:
    """Counts pages; `is_broken` makes the next spill fail, `is_damaged` the next restore."""

    def __init__(self, num_pages):
        self.num_pages = num_pages
        self.owned = {}
        self.spilled = set()
        self.is_broken = self.is_damaged = False

    @property
    def capacity_tokens(self):
        return self.num_pages * PAGE_TOKENS

    @property
    def free_tokens(self):
        return self.capacity_tokens - sum(self.owned.values()) * PAGE_TOKENS

    def open(self, sequence_id, num_tokens):
        assert sequence_id not in self.owned, "opened twice"
        self.owned[sequence_id] = 0
        assert self.grow(sequence_id, num_tokens), "opened without room"

    def grow(self, sequence_id, num_tokens):
        more = pages_for(num_tokens) - self.owned[sequence_id]
        if more * PAGE_TOKENS > self.free_tokens:
            return False
        self.owned[sequence_id] += max(more, 0)
        return True

    def close(self, sequence_id):
        assert sequence_id in self.owned or sequence_id in self.spilled, "closed twice"
        self.owned.pop(sequence_id, None)
        self.spilled.discard(sequence_id)

    def spill(self, sequence_id):
        if self.is_broken:
            self.is_broken = False
            raise MachineError("ZI-0000", "no space left", remedy="-")
        self.spilled.add(sequence_id)
        return self.owned.pop(sequence_id)

    def restore(self, sequence_id, num_tokens):
        self.spilled.remove(sequence_id)
        if self.is_damaged:
            self.is_damaged = False
            return False
        self.open(sequence_id, num_tokens)
        return True


def make(number, prompt_len, max_tokens):
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(number, list(range(prompt_len)), params, seed=0)


class Machine(RuleBasedStateMachine):
    """Runs passes by hand: what a request fed is checked against what it should have fed."""

    requests = Bundle("requests")

    def __init__(self):
        super().__init__()
        self.pages = FakePages(12)
        self.wants_spill = False
        self.scheduler = Scheduler(
            self.pages, max_batch=5, max_rows=24, wants_spill=lambda tokens: self.wants_spill
        )
        self.alive = {}
        self.ended = set()
        self.number = 0

    @rule(target=requests, prompt_len=st.integers(1, 90), max_tokens=st.integers(1, 90))
    def submit(self, prompt_len, max_tokens):
        request = make(self.number, prompt_len, max_tokens)
        self.number += 1
        self.scheduler.submit(request)
        self.alive[request.id] = request
        return request

    @rule(rows=st.integers(1, 40), stops=st.sets(st.integers(0, 30)))
    def step(self, rows, stops):
        pieces = self.scheduler.compose(rows)
        assert bool(pieces) == bool(self.alive)
        assert len({id(request) for request, _, _ in pieces}) == len(pieces)
        assert sum(len(ids) for _, ids, _ in pieces) <= self.scheduler.max_rows
        for request, ids, _ in pieces:
            known = request.prompt_ids + request.output_ids
            assert ids == known[request.num_committed : request.num_committed + len(ids)] != []
            assert request.num_committed + len(ids) <= self.pages.owned[request.id] * PAGE_TOKENS
            is_sampling = request.is_sampling_at(request.num_committed + len(ids))
            request.num_committed += len(ids)
            if is_sampling:
                request.output_ids.append(7)
                if len(request.output_ids) == request.params.max_tokens or request.id in stops:
                    self.end(request)

    def end(self, request):
        assert request.id not in self.ended
        self.ended.add(request.id)
        del self.alive[request.id]
        self.scheduler.finish(request)

    @rule(request=consumes(requests))
    def lose_interest(self, request):
        if request.id in self.alive:
            self.end(request)

    @rule(wants_spill=st.booleans(), is_broken=st.booleans(), is_damaged=st.booleans())
    def weather(self, wants_spill, is_broken, is_damaged):
        self.wants_spill, self.pages.is_broken, self.pages.is_damaged = wants_spill, is_broken, is_damaged

    @rule()
    def preempt_all(self):
        self.scheduler.preempt_all()
        assert not self.pages.owned and not self.pages.spilled
        assert all(request.num_committed == 0 for request in self.alive.values())

    @invariant()
    def books_balance(self):
        self.scheduler.check()
        assert len(self.scheduler) == len(self.alive)
        assert self.pages.free_tokens >= 0
        assert set(self.pages.owned) | self.pages.spilled <= set(self.alive)

    def teardown(self):
        oldest = min(self.alive, default=None)
        for _ in range(3000):
            if not self.alive:
                return
            self.step(24, set())
            if oldest not in self.alive:
                oldest = min(self.alive, default=None)
        raise AssertionError(f"requests starved: {self.alive}")


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def run_out(scheduler, requests, rows=100):
    """Passes until all have ended: [(request id, rows)] per pass."""
    passes = []
    for request in requests:
        scheduler.submit(request)
    while len(scheduler):
        pieces = scheduler.compose(rows)
        passes.append([(request.id, len(ids)) for request, ids, _ in pieces])
        for request, ids, _ in pieces:
            is_sampling = request.is_sampling_at(request.num_committed + len(ids))
            request.num_committed += len(ids)
            if is_sampling:
                request.output_ids.append(7)
                if len(request.output_ids) == request.params.max_tokens:
                    scheduler.finish(request)
    return passes


def test_a_slot_is_refilled_in_the_next_pass():
    scheduler = Scheduler(FakePages(99), max_batch=2, max_rows=64)
    passes = run_out(scheduler, [make(0, 4, 2), make(1, 4, 5), make(2, 3, 2)])
    assert passes == [
        [(0, 4), (1, 4)],
        [(0, 1), (1, 1)],
        [(1, 1), (2, 3)],  # decode and the newcomer's prompt in one pass
        [(1, 1), (2, 1)],
        [(1, 1)],
    ]


@pytest.mark.parametrize("rows", [32, 64, 256])
def test_a_cache_for_all_at_their_end_admits_all(rows):
    """What the planner counts on: nobody waits for pages that nobody will ask for."""
    scheduler = Scheduler(FakePages(16 * 2), max_batch=16, max_rows=256)
    passes = run_out(scheduler, [make(number, 16, 14) for number in range(16)], rows=rows)
    assert max(len(pieces) for pieces in passes) == 16
    assert scheduler.preemptions.dropped == 0
    fed = -(-16 * 16 // rows)
    assert len(passes) <= 14 + 2 * fed


def test_a_long_prompt_is_fed_in_pieces_beside_decoding():
    scheduler = Scheduler(FakePages(99), max_batch=2, max_rows=10)
    passes = run_out(scheduler, [make(0, 3, 4), make(1, 20, 1)])
    assert passes == [[(0, 3), (1, 7)], [(0, 1), (1, 9)], [(0, 1), (1, 4)], [(0, 1)]]


def test_what_lacks_pages_is_preempted_youngest_first_and_ends_all_the_same():
    pages = FakePages(4)
    scheduler = Scheduler(pages, max_batch=2, max_rows=64)
    requests = [make(0, 15, 40), make(1, 15, 40)]
    passes = run_out(scheduler, requests)
    assert scheduler.preemptions.dropped > 0
    assert all(len(request.output_ids) == 40 for request in requests)
    first = {number: at for at, rows in enumerate(passes) for number, _ in rows}
    assert first[0] < first[1], "the oldest is never held up by a younger one"


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_spilled_sequence_comes_back_or_is_computed_again(is_damaged):
    pages = FakePages(4)
    pages.is_damaged = is_damaged
    scheduler = Scheduler(pages, max_batch=2, max_rows=64, wants_spill=lambda tokens: True)
    requests = [make(0, 15, 40), make(1, 15, 40)]
    passes = run_out(scheduler, requests)
    assert scheduler.preemptions.spilled > 0 and scheduler.preemptions.damaged == is_damaged
    refed = sum(rows for per_pass in passes for number, rows in per_pass if number == 1) - (15 + 39)
    assert (refed > 0) == is_damaged


def test_what_can_never_fit_is_refused_with_the_numbers():
    scheduler = Scheduler(FakePages(2), max_batch=2, max_rows=64)
    with pytest.raises(BudgetError, match=r"33 tokens.*holds 32") as caught:
        scheduler.submit(make(0, 30, 3))
    assert caught.value.code == "ZI-2201" and len(scheduler) == 0


def test_rows_of_logits_are_limited():
    scheduler = Scheduler(FakePages(99), max_batch=2, max_rows=64, max_logit_rows=8)
    request = Request(0, list(range(30)), SamplingParams(max_tokens=1), 0, on_logits=lambda at, rows: None)
    request.logits_from = 5
    scheduler.submit(request)
    fed = []
    while request.num_committed < 30:
        ((_, ids, _),) = scheduler.compose(64)
        fed.append(len(ids))
        request.num_committed += len(ids)
    assert fed == [13, 8, 8, 1]


@pytest.mark.parametrize("sizes", [[5, 1, 1, 1], [4, 4, 4], [1] * 20, [3, 7, 2, 25, 5, 1, 1]])
def test_micro_batches_are_full_and_keep_the_order_of_tokens(sizes):
    pieces = [Piece(make(number, 9, 1), list(range(size)), 10 * number) for number, size in enumerate(sizes)]
    micros = split_rows(pieces, 8)
    assert [sum(len(ids) for _, ids, _ in micro) for micro in micros[:-1]] == [8] * (len(micros) - 1)
    assert sum(len(ids) for micro in micros for _, ids, _ in micro) == sum(sizes)
    for request, ids, start in pieces:
        parts = [part for micro in micros for part in micro if part.request is request]
        assert [token for part in parts for token in part.ids] == ids
        assert [part.start for part in parts] == [start, *(part.stop for part in parts[:-1])]
