"""The virtual clock: pipelines reach the slower of their stages, the serial twin their sum, more memory never hurts."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from links_of import machine_with
from plan_tables import page_counts, table_of

from zinfer.chunks.table import PAGE
from zinfer.config.machine import Overlap, There
from zinfer.errors import InternalError
from zinfer.plan.place import Reserve, place, smallest_budget
from zinfer.plan.records import Budget, Compute, Schedule, Tier
from zinfer.plan.schedule import build_schedule, serial_schedule, steady_steps
from zinfer.plan.simulate import Simulator, least_seconds, simulate, simulate_passes, simulate_steady


def two_tiers(count, resident, lookahead, compute_s, disk=1.0):
    """`count` equal chunks of one page, of which `resident` stay; seconds of a steady and of a serial pass."""
    table = table_of([1] * count)
    budget = Budget(host=(resident + lookahead + 1) * PAGE)
    placement = place(table, budget, compute_tier=Tier.HOST, reserve=Reserve(), lookahead=lookahead)
    overlapped, serial = (
        simulate(table, placement, build(table, placement), machine_with(disk), [compute_s] * count)[1]
        for build in (build_schedule, serial_schedule)
    )
    return overlapped, serial


@pytest.mark.parametrize("lookahead", [1, 2, 3])
@pytest.mark.parametrize("resident", [0, 8, 16, 24])
def test_when_transfer_equals_compute_a_pass_takes_one_of_them_and_the_serial_one_their_sum(
    resident, lookahead
):
    count = 40
    streamed = count - resident
    overlapped, serial = two_tiers(count, resident, lookahead, compute_s=streamed / count)
    assert overlapped.bytes == {"disk": streamed * PAGE}
    # One chunk in flight rides over no unevenness: what computes is then at times two chunks, at times one.
    assert overlapped.seconds <= (1.12 if lookahead == 1 else 1.02) * streamed
    assert serial.seconds == pytest.approx(2 * streamed, rel=0.01)


@pytest.mark.parametrize("compute_s", [0.1, 10.0])
def test_the_slower_of_link_and_computation_decides(compute_s):
    overlapped, _ = two_tiers(40, 20, 1, compute_s)
    assert overlapped.seconds == pytest.approx(max(20, 40 * compute_s), rel=0.02)
    assert overlapped.busy_s["compute"] == pytest.approx(40 * compute_s)
    assert overlapped.busy_s["disk"] == pytest.approx(20)
    assert overlapped.bubble_s == pytest.approx(overlapped.seconds - 40 * compute_s)


def test_three_tiers_overlap_disk_link_and_computation():
    table = table_of([1] * 60)
    budget = Budget(host=(5 + 14) * PAGE, device=(5 + 26) * PAGE)
    placement = place(table, budget, compute_tier=Tier.DEVICE, reserve=Reserve(), lookahead=4)
    streamed, on_disk = 34, 20
    assert placement.home.count(Tier.DISK) == on_disk
    machine = machine_with(disk=on_disk / streamed, h2d=1.0)  # disk, link and computation: 34 s each
    compute_s = [streamed / 60] * 60
    _, steady = simulate(table, placement, build_schedule(table, placement), machine, compute_s)
    assert steady.bytes == {"disk": on_disk * PAGE, "h2d": streamed * PAGE}
    assert steady.busy_s == pytest.approx({"disk": 34, "h2d": 34, "compute": 34})
    assert steady.seconds <= 1.02 * 34
    _, serial = simulate(table, placement, serial_schedule(table, placement), machine, compute_s)
    assert serial.seconds == pytest.approx(3 * 34, rel=0.01)


def test_staging_slots_bound_what_is_read_ahead():
    table = table_of([1] * 40)
    seconds = {}
    for staging in (1, 2):
        budget = Budget(host=staging * PAGE, device=4 * PAGE)
        placement = place(table, budget, compute_tier=Tier.DEVICE, reserve=Reserve(), lookahead=3)
        assert placement.staging == staging
        machine = machine_with(disk=1.0, h2d=1.0)
        _, steady = simulate(table, placement, build_schedule(table, placement), machine, [0.01] * 40)
        seconds[staging] = steady.seconds
    assert seconds[1] == pytest.approx(80)  # one slot: read, then copy, then read
    assert seconds[2] == pytest.approx(40)


@pytest.mark.parametrize("num_rows_s", [0.0, 5.0])
def test_the_first_pass_reads_everything_once_and_never_idles_the_disk(num_rows_s):
    table = table_of([1] * 40)
    placement = place(table, Budget(host=20 * PAGE), compute_tier=Tier.HOST, reserve=Reserve())
    schedule = build_schedule(table, placement)
    first, steady = simulate(table, placement, schedule, machine_with(1.0), [0.01] * 40, rows_s=num_rows_s)
    assert first.bytes == {"disk": (40 + placement.slots) * PAGE}  # the next pass's first chunks too
    assert first.seconds == pytest.approx(40, abs=0.1 + num_rows_s)
    assert steady.seconds == pytest.approx(22, abs=1e-6 + num_rows_s)
    assert first.peak_bytes[Tier.HOST] == 20 * PAGE


@given(page_counts, st.integers(0, 200), st.integers(1, 40), st.floats(0.01, 10), st.integers(1, 3))
def test_more_memory_is_never_slower_by_more_than_the_filling_of_the_slots(
    pages, extra, step, compute_s, lookahead
):
    table = table_of(pages)
    least = smallest_budget(table, compute_tier=Tier.HOST, reserve=Reserve(), lookahead=lookahead).host
    seconds = []
    for host in (least + extra * PAGE, least + (extra + step) * PAGE):
        placement = place(
            table, Budget(host=host), compute_tier=Tier.HOST, reserve=Reserve(), lookahead=lookahead
        )
        schedule = build_schedule(table, placement)
        work = [compute_s * count for count in pages]
        seconds.append(simulate(table, placement, schedule, machine_with(1.0), work)[1].seconds)
    fill_s = max(pages) * (1 + compute_s) * (lookahead + 1)
    assert seconds[1] <= seconds[0] + fill_s


@pytest.mark.parametrize("h2d", [None, 0.7])
@given(page_counts, st.integers(0, 99), st.integers(0, 99), st.floats(0.01, 10), st.integers(0, 3))
def test_a_steady_pass_alone_is_the_one_behind_those_that_load(
    h2d, pages, extra, below, compute_s, lookahead
):
    table, tier = table_of(pages, row_table_pages=2), Tier.DEVICE if h2d else Tier.HOST
    least = smallest_budget(table, compute_tier=tier, reserve=Reserve(), lookahead=lookahead)
    budget = Budget(least.host + (below if h2d else extra) * PAGE, least.device + extra * PAGE * bool(h2d))
    placement = place(table, budget, compute_tier=tier, reserve=Reserve(), lookahead=lookahead)
    schedule, machine = build_schedule(table, placement), machine_with(1.0, h2d)
    work = [compute_s * count for count in [*pages, 0]]
    passes = simulate_passes(table, placement, schedule, machine, [work], rows_s=[0.5], num_steady=12)
    alone = simulate_steady(table, placement, schedule.steady, machine, work, rows_s=0.5)
    assert schedule.steady == steady_steps(table, placement)
    assert alone.bytes == passes[-1].bytes
    assert alone.busy_s == pytest.approx(passes[-1].busy_s)
    assert alone.peak_bytes == passes[-1].peak_bytes
    assert alone.seconds == pytest.approx(passes[-1].seconds)
    assert least_seconds(table, placement, machine, work) <= alone.seconds * (1 + 1e-9)


@settings(max_examples=20)
@given(page_counts, st.integers(0, 200), st.floats(0.1, 10))
def test_faster_machines_are_never_slower(pages, extra, factor):
    table = table_of(pages)
    least = smallest_budget(table, compute_tier=Tier.HOST, reserve=Reserve()).host
    placement = place(table, Budget(host=least + extra * PAGE), compute_tier=Tier.HOST, reserve=Reserve())
    schedule = build_schedule(table, placement)
    slow = simulate(table, placement, schedule, machine_with(1.0), [1.0] * len(pages))[1]
    fast = simulate(table, placement, schedule, machine_with(1.0 + factor), [1.0] * len(pages))[1]
    assert fast.seconds <= slow.seconds + 1e-9


def test_a_schedule_that_computes_what_it_has_not_fetched_is_our_mistake():
    table = table_of([1] * 4)
    placement = place(table, Budget(host=3 * PAGE), compute_tier=Tier.HOST, reserve=Reserve())
    broken = Schedule((Compute(0),), ())
    with pytest.raises(InternalError, match="chunk 0"):
        Simulator(table, placement, machine_with(1.0)).run(broken.first, [1.0] * 4)


@pytest.mark.parametrize(("disk", "compute_s"), [(0.25, 0.5), (4.0, 2.0), (1.0, 1.0)])
def test_what_works_at_once_is_slowed_and_no_more(disk, compute_s):
    """All streams: the longer of the two, plus what the overlap with the shorter one costs it."""
    count, both = 64, Overlap(disk=1.5, compute=1.25)
    table = table_of([1] * count)
    placement = place(table, Budget(host=4 * PAGE), compute_tier=Tier.HOST, reserve=Reserve(), lookahead=3)
    schedule = build_schedule(table, placement)
    machine = machine_with(disk)
    alone = simulate(table, placement, schedule, machine, [compute_s] * count)[1]
    slowed = simulate(
        table, placement, schedule, machine.model_copy(update={"overlap": both}), [compute_s] * count
    )[1]
    disk_s, work_s = count / disk, count * compute_s
    wanted = max(disk_s + 0.5 * min(work_s * 1.25, disk_s), work_s + 0.25 * min(disk_s * 1.5, work_s))
    assert alone.seconds == pytest.approx(max(disk_s, work_s), rel=0.06)
    assert slowed.seconds == pytest.approx(wanted, rel=0.06)
    assert slowed.bytes == alone.bytes


@pytest.mark.parametrize("resident", [0, 4, 16])
@pytest.mark.parametrize("compute_s", [0.1, 3.0])
def test_the_first_pass_finds_pages_for_what_stays(resident, compute_s):
    """Finding pages is work of the processor: it shows where that is the slower one, and never later."""
    count, rate = 16, 0.5 * PAGE  # two seconds a chunk
    table = table_of([1] * count)
    slots = 0 if resident == count else 3
    budget = Budget(host=(resident + slots) * PAGE)
    placement = place(table, budget, compute_tier=Tier.HOST, reserve=Reserve(), lookahead=2)
    assert sum(map(placement.resident, range(count))) == resident
    schedule, machine = build_schedule(table, placement), machine_with(1.0)
    fresh = machine.model_copy(update={"fresh_bytes_per_s": rate})
    first, steady = simulate(table, placement, schedule, machine, [compute_s] * count)
    slow_first, same_steady = simulate(table, placement, schedule, fresh, [compute_s] * count)
    assert same_steady == steady if not resident else same_steady.seconds == steady.seconds
    added_s = 2.0 * resident
    assert first.seconds <= slow_first.seconds <= first.seconds + added_s + 1e-9
    assert slow_first.busy_s["compute"] == pytest.approx(first.busy_s["compute"] + added_s)
    if compute_s > 1:
        assert slow_first.seconds == pytest.approx(first.seconds + added_s)


def test_pages_of_a_large_chunk_at_the_end_are_found_before_it_is_needed():
    """The head of a model: its memory is found while the disk still brings what comes before it."""
    table = table_of([1] * 12 + [8])
    placement = place(table, Budget(host=11 * PAGE), compute_tier=Tier.HOST, reserve=Reserve(), lookahead=2)
    assert list(filter(placement.resident, range(13))) == [12]
    machine = machine_with(1.0).model_copy(update={"fresh_bytes_per_s": PAGE})  # as fast as the disk
    schedule = build_schedule(table, placement)
    first, _ = simulate(table, placement, schedule, machine, [0.01] * 13)
    known, _ = simulate(table, placement, schedule, machine_with(1.0), [0.01] * 13)
    assert first.busy_s["compute"] == pytest.approx(known.busy_s["compute"] + 8.0)
    assert first.seconds < known.seconds + 8.0 - 3.0, "most of it beside the reads"


def test_memory_of_guests_is_found_beside_the_second_pass():
    count, rate = 16, 0.5 * PAGE  # two seconds a chunk
    table = table_of([1] * count)
    placement = place(table, Budget(host=11 * PAGE), compute_tier=Tier.HOST, reserve=Reserve(), lookahead=2)
    stay = tuple(filter(placement.resident, range(count)))
    machine = machine_with(1.0).model_copy(update={"fresh_bytes_per_s": rate})

    def passes(guests):
        invited = replace(placement, guests=guests)
        schedule = build_schedule(table, invited)
        work = [[0.25] * count, [0.125] * count]
        return simulate_passes(table, invited, schedule, machine, work, rows_s=[0.0], num_steady=2)

    first, *_, steady = passes(())
    assert first.busy_s["compute"] == count * 0.25 + 2.0 * len(stay) == 4.0 + 16.0
    guest_first, guest_second, *_, same_steady = passes(stay[:5])
    assert guest_first.busy_s["compute"] == 4.0 + 2.0 * 3
    assert guest_second.busy_s["compute"] == 2.0 + 2.0 * 5
    assert guest_second.bytes["disk"] == steady.bytes["disk"] + 5 * PAGE
    assert guest_first.bytes == first.bytes
    assert same_steady.bytes == steady.bytes
    assert same_steady.busy_s == steady.busy_s
    assert guest_first.seconds < first.seconds
    assert max(run.peak_bytes[Tier.HOST] for run in (guest_first, guest_second)) <= 11 * PAGE


@pytest.mark.parametrize("there", [0, 3, 6, 9, 100])
def test_memory_that_is_there_is_used_first_and_by_slots_before_all(there):
    """Three slots take of it, then what stays in the first pass, then what comes to stay in the second."""
    count, slots = 16, 3
    table = table_of([1] * count)
    placement = place(table, Budget(host=11 * PAGE), compute_tier=Tier.HOST, reserve=Reserve(), lookahead=2)
    stay = tuple(filter(placement.resident, range(count)))
    assert (placement.slots, len(stay)) == (slots, 8)
    invited = replace(placement, guests=stay[:4])
    machine = machine_with(1.0).model_copy(
        update={
            "fresh_bytes_per_s": 0.5 * PAGE,
            "there": There(nbytes=there * PAGE, bytes_per_s=4.0 * PAGE),
        }
    )
    work, schedule = [[0.0] * count], build_schedule(table, invited)
    runs = simulate_passes(table, invited, schedule, machine, work, rows_s=[0.0], num_steady=1)
    left, wanted = max(there - slots, 0), []
    for needed in (4, 4, 0):
        quick = min(left, needed)
        wanted.append(quick * 0.25 + (needed - quick) * 2.0)
        left -= quick
    assert [run.busy_s["compute"] for run in runs] == pytest.approx(wanted)


def test_finding_costs_what_each_part_of_it_does():
    machine = machine_with(1.0)
    assert machine.finding_s(100) == 0.0, "nobody has measured it"
    machine = machine.model_copy(update={"fresh_bytes_per_s": 2.0})
    assert machine.finding_s(100) == machine.finding_s(100, before=7) == 50.0
    machine = machine.model_copy(update={"there": There(nbytes=60, bytes_per_s=20.0)})
    assert machine.finding_s(100) == 3.0 + 20.0
    assert machine.finding_s(40) == 2.0
    assert machine.finding_s(40, before=40) == 1.0 + 10.0
    assert machine.finding_s(40, before=60) == machine.finding_s(40, before=61) == 20.0


def test_below_a_device_pages_are_found_by_pinning():
    table = table_of([1] * 8)
    budget = Budget(host=8 * PAGE, device=8 * PAGE)
    placement = place(table, budget, compute_tier=Tier.DEVICE, reserve=Reserve(), lookahead=1)
    machine = machine_with(1.0, h2d=2.0).model_copy(
        update={"fresh_bytes_per_s": 1.0, "there": There(nbytes=PAGE)}
    )
    plain = machine.model_copy(update={"fresh_bytes_per_s": None})
    schedule = build_schedule(table, placement)
    assert simulate(table, placement, schedule, machine, [1.0] * 8) == simulate(
        table, placement, schedule, plain, [1.0] * 8
    )


def test_what_stays_is_not_slowed():
    table = table_of([1] * 8)
    placement = place(table, Budget(host=9 * PAGE), compute_tier=Tier.HOST, reserve=Reserve(), lookahead=1)
    machine = machine_with(1.0).model_copy(update={"overlap": Overlap(disk=2, compute=3)})
    first, steady = simulate(table, placement, build_schedule(table, placement), machine, [1.0] * 8)
    assert steady.seconds == 8.0
    assert first.seconds > 16.0
