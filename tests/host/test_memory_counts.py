"""Fetches per pass, counted at the transfer seam, equal theory; an activation peak evicts before its moment."""

from collections import Counter

import chunk_files
import pytest

from zinfer.errors import BudgetError
from zinfer.memory.assemble import open_manager
from zinfer.plan.evict import Belady, Lru
from zinfer.plan.records import Budget, Tier

PAGE = 4096


def open_counted(table, placement, monkeypatch, *, extra=0, **options):
    """A manager whose budget is its places plus `extra`, and the count of orders its transfer was given."""
    need = {tier: chunk_files.needed_bytes(table, placement, tier) for tier in (Tier.HOST, Tier.DEVICE)}
    need[placement.compute_tier] += extra
    if placement.compute_tier is Tier.DEVICE:
        options |= {"device": "sim", "machine": chunk_files.FAST}
    manager = open_manager(table, placement, Budget(need[Tier.HOST], need[Tier.DEVICE]), **options)
    counts, begin = Counter(), manager._memory.transfer.begin
    monkeypatch.setattr(
        manager._memory.transfer, "begin", lambda order: counts.update([order.chunk.id]) or begin(order)
    )
    return manager, counts


def run_pass(manager, *, lookahead=0):
    """One pass in order, fetching `lookahead` streamed chunks ahead, around the end; no evictions of our own."""
    streamed = [chunk.id for chunk in manager.table.chunks if not manager.placement.resident(chunk.id)]
    for chunk in manager.table.chunks:
        at = streamed.index(chunk.id) if chunk.id in streamed else None
        ahead = [] if at is None else [streamed[(at + i) % len(streamed)] for i in range(1, lookahead + 1)]
        for number in [chunk.id, *ahead]:
            manager.prefetch(number)
        manager.lease(chunk.id).release()
        if at is not None and lookahead:
            manager.evict(chunk.id)


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize(("num_chunks", "room", "lookahead"), [(12, 4, 1), (12, 6, 0), (10, 5, 2), (8, 8, 1)])
def test_a_pinned_set(tmp_path, monkeypatch, device, num_chunks, room, lookahead):
    """N - (C - 1 - d) fetches per pass: what streams needs d + 1 of the C places."""
    table, _ = chunk_files.write_chunks(tmp_path, [1] * num_chunks)
    resident = range(num_chunks) if room == num_chunks else range(room - 1 - lookahead)
    slots = room - len(resident)
    placement = (
        chunk_files.cpu_placement(table, resident, slots)
        if device == "cpu"
        else chunk_files.sim_placement(table, resident, (), slots, 1)
    )
    manager, counts = open_counted(table, placement, monkeypatch, policy=None if lookahead else Lru())
    passes = 4
    for _ in range(2 + passes):
        before = counts.total()
        run_pass(manager, lookahead=lookahead)
    per_pass = counts.total() - before
    assert per_pass == (0 if slots == 0 else num_chunks - (room - 1 - lookahead))
    assert all(counts[chunk] == 1 for chunk in resident)
    assert manager.surprises == 0
    manager.check()
    manager.close()


@pytest.mark.parametrize(("num_chunks", "room"), [(12, 4), (7, 3)])
def test_belady_and_lru(tmp_path, monkeypatch, num_chunks, room):
    """N(N-C)/(N-1) per pass on average over N - 1 passes, and N."""
    table, _ = chunk_files.write_chunks(tmp_path, [1] * num_chunks)
    placement = chunk_files.cpu_placement(table, (), room)
    fetched = {}
    for name, policy in (("belady", Belady(range(num_chunks))), ("lru", Lru())):
        manager, counts = open_counted(table, placement, monkeypatch, policy=policy)
        for number in range(2 * (num_chunks - 1)):
            if number == num_chunks - 1:
                counts.clear()
            run_pass(manager)
        fetched[name] = counts.total()
        manager.check()
        manager.close()
    passes = num_chunks - 1
    assert fetched["belady"] == pytest.approx(
        passes * num_chunks * (num_chunks - room) / (num_chunks - 1), abs=1
    )
    assert fetched["lru"] == passes * num_chunks


class Watch:
    """The order of events at one tier: evictions and reservations, with what was held then."""

    def __init__(self, manager, monkeypatch):
        self.events = []
        ledger = manager._memory.tiers[manager.placement.compute_tier].ledger
        give_back, reserve = ledger.give_back, ledger.reserve

        def watched_give_back(key):
            self.events.append(("evict", key))
            give_back(key)

        def watched_reserve(name, nbytes):
            reserve(name, nbytes)
            self.events.append((name, nbytes))
            assert sum(ledger.held.values()) + sum(ledger.reserved.values()) <= ledger.capacity_bytes

        monkeypatch.setattr(ledger, "give_back", watched_give_back)
        monkeypatch.setattr(ledger, "reserve", watched_reserve)


def tide(table, monkeypatch, moments, policy):
    """Eight one-page chunks, places for all, a budget of six pages: what else a moment needs pushes chunks out."""
    placement = chunk_files.cpu_placement(table, range(8), 0)
    budget = Budget(host=6 * PAGE)
    manager = open_manager(table, placement, budget, policy=policy, moments=moments)
    return manager, Watch(manager, monkeypatch)


def test_a_peak_evicts_before_its_moment(tmp_path, monkeypatch):
    table, contents = chunk_files.write_chunks(tmp_path, [1] * 8)
    moments = [0, 0, 0, 3 * PAGE, 0, 0, 0, 0]
    manager, watch = tide(table, monkeypatch, moments, Belady(range(8)))
    most_held = 0
    for _ in range(4):
        for moment in range(8):
            watch.events.clear()
            manager.advance(moment)
            # All that goes has gone before the moment's bytes are there, and at the peak nothing more has to go.
            assert [name for name, _ in watch.events].index("moment") == len(watch.events) - 1
            manager.prefetch(moment)
            with manager.lease(moment) as lease:
                assert chunk_files.bytes_of(lease, table.chunks[moment]) == contents[moment]
            manager.check()
            ledger = manager._memory.tiers[Tier.HOST].ledger
            assert ledger.reserved["moment"] == moments[moment]
            assert ledger.peak_bytes <= 6 * PAGE
            most_held = max(most_held, len(ledger.held))
    assert most_held == 6  # where no peak is, weights have the whole budget: the tide comes back
    manager.close()


def test_without_room_for_the_peak_the_static_twin_fails(tmp_path, monkeypatch):
    """The same model, budget and peak, with a manager that is not told of moments: the peak finds no room."""
    table, _ = chunk_files.write_chunks(tmp_path, [1] * 8)
    manager, _ = tide(table, monkeypatch, [], Belady(range(8)))
    for number in range(6):
        manager.prefetch(number)
        manager.lease(number).release()
    with pytest.raises(
        BudgetError, match=r"activations needs 12\.00 KiB of host memory, 0 B of the 24\.00 KiB"
    ):
        manager._memory.tiers[Tier.HOST].ledger.reserve("activations", 3 * PAGE)
    manager.check()
    manager.close()


def test_a_peak_beyond_the_budget_is_refused_with_the_numbers(tmp_path, monkeypatch):
    table, _ = chunk_files.write_chunks(tmp_path, [1] * 8)
    manager, _ = tide(table, monkeypatch, [0, 7 * PAGE], Belady(range(8)))
    manager.advance(0)
    for number in range(5):
        manager.prefetch(number)
    with pytest.raises(BudgetError, match=r"moment needs 28\.00 KiB .* the 24\.00 KiB allowed"):
        manager.advance(1)
    manager.check()
    manager.close()


def test_a_peak_may_not_push_out_what_is_leased(tmp_path, monkeypatch):
    table, contents = chunk_files.write_chunks(tmp_path, [1] * 8)
    manager, _ = tide(table, monkeypatch, [0, 5 * PAGE, 6 * PAGE], Belady(range(8)))
    for number in range(6):
        manager.prefetch(number)
    with manager.lease(3) as lease:
        manager.advance(1)
        assert set(manager._memory.tiers[Tier.HOST].places) == {3}
        assert chunk_files.bytes_of(lease, table.chunks[3]) == contents[3]
        with pytest.raises(BudgetError):
            manager.advance(2)
        assert chunk_files.bytes_of(lease, table.chunks[3]) == contents[3]
    manager.close()


def test_memory_pushed_out_is_really_given_back(tmp_path, monkeypatch):
    table, _ = chunk_files.write_chunks(tmp_path, [1] * 8)
    manager, _ = tide(table, monkeypatch, [0, 6 * PAGE], Belady(range(8)))
    manager.prefetch(0).wait()
    place_N = manager._memory.tiers[Tier.HOST].bytes_of(0)
    assert place_N.any()
    manager.advance(1)
    assert not place_N.any()
    manager.close()
