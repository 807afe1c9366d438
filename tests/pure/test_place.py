"""Placement: within the budget, as much kept as possible, evenly spread, and a refusal that helps."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_tables import equal_page_counts, page_counts, table_of

from zinfer.chunks.table import PAGE
from zinfer.errors import BudgetError
from zinfer.plan.place import Reserve, place, smallest_budget, spread, tier_uses
from zinfer.plan.records import Budget, Placement, Tier
from zinfer.units import MIB, Bytes

TIERS = st.sampled_from([Tier.HOST, Tier.DEVICE])
RESERVES = st.builds(Reserve, kv=st.integers(0, 5 * PAGE), activations=st.integers(0, 5 * PAGE))
LOOKAHEADS = st.integers(0, 3)


def more(budget, host, device):
    return Budget(host=budget.host + host * PAGE, device=budget.device + device * PAGE)


def streamed_bytes(table, placement):
    return sum(chunk.nbytes for chunk in table.streamable if not placement.resident(chunk.id))


def disk_bytes(table, placement):
    return sum(chunk.nbytes for chunk in table.streamable if placement.home[chunk.id] is Tier.DISK)


@given(page_counts, TIERS, RESERVES, LOOKAHEADS, st.integers(0, 400), st.integers(0, 400))
def test_no_tier_holds_more_than_its_budget(pages, tier, reserve, lookahead, host, device):
    table = table_of(pages, row_table_pages=3)
    smallest = smallest_budget(table, compute_tier=tier, reserve=reserve, lookahead=lookahead)
    budget = more(smallest, host, device if tier is Tier.DEVICE else 0)
    placement = place(table, budget, compute_tier=tier, reserve=reserve, lookahead=lookahead)
    for use in tier_uses(table, placement, budget, reserve):
        assert use.total <= use.budget
    assert len(placement.home) == len(table.chunks)
    streamed = [chunk for chunk in table.streamable if not placement.resident(chunk.id)]
    assert not streamed or len(streamed) > placement.slots
    assert bool(streamed) == bool(placement.slots)


@given(page_counts, TIERS, RESERVES, LOOKAHEADS, st.integers(0, 400), st.integers(1, 50))
def test_a_larger_budget_never_streams_more(pages, tier, reserve, lookahead, extra, step):
    table = table_of(pages)
    smallest = smallest_budget(table, compute_tier=tier, reserve=reserve, lookahead=lookahead)
    args = {"compute_tier": tier, "reserve": reserve, "lookahead": lookahead}
    small = place(table, more(smallest, extra, extra), **args)
    large = place(table, more(smallest, extra + step, extra + step), **args)
    assert streamed_bytes(table, large) <= streamed_bytes(table, small)
    if tier is Tier.HOST:
        assert disk_bytes(table, large) <= disk_bytes(table, small)


@given(page_counts, TIERS, RESERVES, LOOKAHEADS)
def test_the_smallest_budget_works_and_a_page_less_is_refused(pages, tier, reserve, lookahead):
    table = table_of(pages)
    args = {"compute_tier": tier, "reserve": reserve, "lookahead": lookahead}
    smallest = smallest_budget(table, **args)
    sizes = sorted((count * PAGE for count in pages), reverse=True)
    # Of every prefix of the largest chunks: keep those, stream the others through slots of the next one's size.
    least = min([sum(sizes), *(sum(sizes[:k]) + (lookahead + 1) * sizes[k] for k in range(len(sizes)))])
    if tier is Tier.HOST:
        assert smallest == Budget(host=reserve.total + least)
    else:
        streaming = min(sum(sizes), (lookahead + 1) * sizes[0])
        assert smallest == Budget(host=sizes[0], device=reserve.total + streaming)
    place(table, smallest, **args)
    for less in (more(smallest, -1, 0), more(smallest, 0, -1)):
        if tier is Tier.HOST and less.device < 0:
            continue
        with pytest.raises(BudgetError) as refused:
            place(table, less, **args)
        assert refused.value.code == "ZI-2001"
        assert "layers." in str(refused.value)
        flag, size = re.fullmatch(r"(--\w+-mem) (\w+)", refused.value.remedy).groups()
        proposed = int(Bytes.parse(size))
        if flag == "--host-mem":
            place(table, Budget(host=proposed, device=smallest.device), **args)
        else:
            place(table, Budget(host=smallest.host, device=proposed), **args)


@given(equal_page_counts, st.integers(0, 40), LOOKAHEADS)
def test_of_equal_chunks_all_that_fit_beside_the_slots_stay_and_the_rest_is_spread(pages, fitting, lookahead):
    table, count = table_of(pages), len(pages)
    if fitting < lookahead + 1:
        return
    placement = place(
        table,
        Budget(host=fitting * pages[0] * PAGE),
        compute_tier=Tier.HOST,
        reserve=Reserve(),
        lookahead=lookahead,
    )
    streamed = [not placement.resident(i) for i in range(count)]
    # N - (C - 1 - d): of C places d + 1 are slots.
    expected = 0 if fitting >= count else count - (fitting - 1 - lookahead)
    assert sum(streamed) == expected
    for width in range(1, count + 1):
        windows = [sum(streamed[at : at + width]) for at in range(count - width + 1)]
        assert max(windows) - min(windows) <= 1


@given(page_counts, st.data())
def test_spreading_keeps_every_prefix_near_its_share(sizes, data):
    numerator = data.draw(st.integers(0, len(sizes)))
    marks = spread(sizes, numerator)
    share = marked = 0
    for size, mark in zip(sizes, marks, strict=True):
        share += size * numerator / len(sizes)
        marked += size if mark else 0
        assert abs(marked - share) <= max(sizes) / 2 + 1e-9
    assert numerator not in {0, len(sizes)} or marks == [numerator > 0] * len(sizes)


def test_host_memory_keeps_what_the_device_cannot_and_only_the_rest_is_on_disk():
    table = table_of([4] * 20)
    budget = Budget(host=(2 + 6) * 4 * PAGE, device=(2 + 8) * 4 * PAGE)
    placement = place(table, budget, compute_tier=Tier.DEVICE, reserve=Reserve())
    counts = {tier: placement.home.count(tier) for tier in Tier}
    assert counts == {Tier.DEVICE: 8, Tier.HOST: 6, Tier.DISK: 6}
    assert (placement.slots, placement.staging, placement.lookahead) == (2, 2, 1)


def test_slots_shrink_where_the_few_largest_chunks_can_stay():
    table = table_of([2] * 30 + [8, 8])
    placement = place(table, Budget(host=(16 + 2 * 2 + 20) * PAGE), compute_tier=Tier.HOST, reserve=Reserve())
    assert placement.slot_bytes == 2 * PAGE
    assert placement.home[30:] == (Tier.HOST, Tier.HOST)
    assert placement.home.count(Tier.HOST) == 2 + 10


def test_a_row_table_stays_only_when_nothing_is_read_in_every_pass():
    table = table_of([4] * 4, row_table_pages=2)
    everything = place(table, Budget(host=18 * PAGE), compute_tier=Tier.HOST, reserve=Reserve())
    assert everything.home[4] is Tier.HOST
    without_it = place(table, Budget(host=17 * PAGE), compute_tier=Tier.HOST, reserve=Reserve())
    assert without_it.home[4] is Tier.DISK
    assert without_it.slots == 0
    streaming = place(table, Budget(host=15 * PAGE), compute_tier=Tier.HOST, reserve=Reserve())
    assert streaming.home[4] is Tier.DISK
    assert streaming.slots == 2


def test_what_copies_start_from_is_page_locked_for_cuda_alone():
    table = table_of([4 * MIB // PAGE] * 6)
    reserve = Reserve(kv=1, activations=2, host_activations=5 * MIB, parked=3 * MIB)
    placement = Placement(
        Tier.DEVICE, (Tier.DEVICE, Tier.HOST, Tier.HOST, Tier.DISK, Tier.DISK, Tier.DISK), 2, 4 * MIB, 3, 1
    )
    budget = Budget(host=64 * MIB, device=64 * MIB)
    device, host = tier_uses(table, placement, budget, reserve, "cuda:0")
    assert device.locked == 0
    assert host.locked == 2 * 4 * MIB + 3 * 4 * MIB + 3 * MIB <= host.total
    assert tier_uses(table, placement, budget, reserve, "sim")[1].locked == 0
