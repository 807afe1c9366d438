"""Ledger, residency table and places: they balance after any sequence of calls, and refuse what is not allowed."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zinfer.errors import BudgetError, InternalError
from zinfer.memory.ledger import Ledger
from zinfer.memory.residency import ALLOWED, Event, Residency, State
from zinfer.memory.slab import HostSlab
from zinfer.memory.tier import TierMemory
from zinfer.plan.records import Tier

PAGE = 4096


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.ledger = Ledger(Tier.HOST, 1000, {"kv": 100})
        self.held, self.reserved, self.peak = {}, {"kv": 100}, 100

    @property
    def spent(self):
        return sum(self.held.values()) + sum(self.reserved.values())

    @rule(key=st.integers(0, 5), nbytes=st.integers(0, 600))
    def take(self, key, nbytes):
        if key in self.held:
            with pytest.raises(InternalError):
                self.ledger.take(key, nbytes)
        elif self.spent + nbytes > 1000:
            with pytest.raises(BudgetError, match=f"{1000 - self.spent} B of the 1000 B"):
                self.ledger.take(key, nbytes)
        else:
            self.ledger.take(key, nbytes)
            self.held[key] = nbytes

    @rule(key=st.integers(0, 5))
    def give_back(self, key):
        if key not in self.held:
            with pytest.raises(InternalError):
                self.ledger.give_back(key)
        else:
            self.ledger.give_back(key)
            del self.held[key]

    @rule(name=st.sampled_from(["kv", "activations"]), nbytes=st.integers(0, 600))
    def reserve(self, name, nbytes):
        if self.spent - self.reserved.get(name, 0) + nbytes > 1000:
            with pytest.raises(BudgetError):
                self.ledger.reserve(name, nbytes)
        else:
            self.ledger.reserve(name, nbytes)
            self.reserved[name] = nbytes

    @invariant()
    def it_balances(self):
        self.peak = max(self.peak, self.spent)
        self.ledger.check()
        assert (self.ledger.held, self.ledger.reserved) == (self.held, self.reserved)
        assert (self.ledger.free_bytes, self.ledger.peak_bytes) == (1000 - self.spent, self.peak)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=40, stateful_step_count=30)


def test_the_refusal_names_a_budget_that_works():
    with pytest.raises(BudgetError, match=r"ZI-2401.*\n.*--device-mem 3KiB"):
        Ledger(Tier.DEVICE, 1024, {"kv": 1000}).take(7, 2000)
    Ledger(Tier.DEVICE, 3 * 1024, {"kv": 1000}).take(7, 2000)
    with pytest.raises(BudgetError, match="kv needs"):
        Ledger(Tier.HOST, 10, {"kv": 11})


@pytest.mark.parametrize(
    "damage", [{"free_bytes": 90}, {"held": {1: 11}}, {"free_bytes": -5, "held": {1: 105}}]
)
def test_the_check_sees_bytes_that_are_nobodys_or_twice_somebodys(damage):
    ledger = Ledger(Tier.HOST, 100)
    for name, value in damage.items():
        setattr(ledger, name, value)
    with pytest.raises(InternalError, match="off by"):
        ledger.check()


class ResidencyMachine(RuleBasedStateMachine):
    """Two chunks in two tiers against a plain model: a state and a number of leases each."""

    def __init__(self):
        super().__init__()
        self.table = Residency()
        self.model = {}

    @rule(
        chunk=st.integers(0, 1),
        tier=st.sampled_from([Tier.HOST, Tier.DEVICE]),
        event=st.sampled_from(list(Event)),
    )
    def move(self, chunk, tier, event):
        state, leases = self.model.get((chunk, tier), (State.ABSENT, 0))
        if (state, event) not in ALLOWED:
            with pytest.raises(InternalError, match=f"chunk {chunk} is {state} in {tier} memory"):
                self.table.move(chunk, tier, event)
            return
        leases += {Event.LEASE: 1, Event.RELEASE: -1}.get(event, 0)
        state = State.LEASED if leases else ALLOWED[state, event]
        self.model[chunk, tier] = (state, leases)
        assert self.table.move(chunk, tier, event) is state

    @invariant()
    def it_agrees(self):
        self.table.check()
        for (chunk, tier), (state, leases) in self.model.items():
            assert self.table.state(chunk, tier) is state
            assert self.table.num_leases(chunk, tier) == leases
            assert (chunk in self.table.chunks(tier, state)) == (state is not State.ABSENT)


TestResidency = ResidencyMachine.TestCase
TestResidency.settings = settings(max_examples=40, stateful_step_count=40)


def test_every_row_that_is_not_in_the_table_raises():
    to = {
        State.ABSENT: [],
        State.ARRIVING: [Event.FETCH],
        State.RESIDENT: [Event.FETCH, Event.ARRIVED],
        State.LEASED: [Event.FETCH, Event.ARRIVED, Event.LEASE],
    }
    legal = 0
    for state, events in to.items():
        for event in Event:
            table = Residency()
            for earlier in events:
                table.move(0, Tier.HOST, earlier)
            if (state, event) in ALLOWED:
                table.move(0, Tier.HOST, event)
                legal += 1
            else:
                with pytest.raises(InternalError, match="ZI-0121"):
                    table.move(0, Tier.HOST, event)
                assert table.state(0, Tier.HOST) is state
    assert legal == len(ALLOWED) == 8


def test_the_residency_check_sees_a_lease_too_many():
    table = Residency()
    table.move(0, Tier.HOST, Event.FETCH)
    table._leases[0, Tier.HOST] = 1
    with pytest.raises(InternalError, match="ZI-0122"):
        table.check()


class PlacesMachine(RuleBasedStateMachine):
    """Three slots, two homes of their own size, a budget one page short of everything."""

    homes = {0: 3 * PAGE, 1: PAGE}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.memory = TierMemory(Ledger(Tier.HOST, 9 * PAGE), HostSlab(10 * PAGE), self.homes, 3, 2 * PAGE)
        self.generations = {}

    @rule(chunk=st.integers(0, 6), as_guest=st.booleans())
    def take_or_give_back(self, chunk, as_guest):
        if chunk in self.memory.places:
            place = self.memory.places[chunk]
            self.generations[place.offset] = place.generation
            self.memory.give_back(chunk)
            return
        free_slots = 3 - sum(not self.memory.is_home(other) for other in self.memory.places)
        has_home = chunk in self.homes and not as_guest
        need = self.homes[chunk] if has_home else 2 * PAGE
        has_room = need <= self.memory.ledger.free_bytes and (has_home or free_slots > 0)
        assert self.memory.has_room(chunk, as_guest=as_guest) == has_room
        assert self.memory.needs_slot(chunk, as_guest=as_guest) == (not has_home and not free_slots)
        if has_room:
            place = self.memory.take(chunk, as_guest=as_guest)
            assert self.memory.is_home(chunk) == has_home
            assert len(self.memory.bytes_of(chunk)) == place.nbytes == need
            assert place.generation > self.generations.get(place.offset, -1)

    @precondition(lambda self: self.memory.places)
    @rule(data=st.data())
    def write(self, data):
        chunk = data.draw(st.sampled_from(sorted(self.memory.places)))
        self.memory.bytes_of(chunk).fill_(chunk + 1)
        self.memory.discard_empty()
        assert self.memory.bytes_of(chunk).eq(chunk + 1).all()

    @invariant()
    def it_balances(self):
        self.memory.check()
        assert self.memory.empty_bytes == 10 * PAGE - sum(
            place.nbytes for place in self.memory.places.values()
        )

    def teardown(self):
        self.memory.close()
        self.memory.ledger.check()
        assert self.memory.ledger.free_bytes == 9 * PAGE


TestPlaces = PlacesMachine.TestCase
TestPlaces.settings = settings(max_examples=25, stateful_step_count=25)


def test_overlapping_places_are_seen():
    memory = TierMemory(Ledger(Tier.HOST, 8 * PAGE), HostSlab(8 * PAGE), {}, 2, 4 * PAGE)
    place = memory.take(0)
    memory._free.append(place.offset)
    with pytest.raises(InternalError, match="two places overlap"):
        memory.check()


def test_lent_slots_are_reserved_and_gone():
    memory = TierMemory(Ledger(Tier.HOST, 9 * PAGE), HostSlab(9 * PAGE), {5: PAGE}, 4, 2 * PAGE)
    lent = memory.lend_slots("staging")
    assert [len(slot) for slot in lent] == [2 * PAGE] * 4
    assert memory.ledger.reserved == {"staging": 8 * PAGE}
    assert memory.needs_slot(0)
    assert not memory.has_room(0)
    memory.take(5)
    memory.check()
