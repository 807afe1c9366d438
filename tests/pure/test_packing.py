"""What stays may stay packed: a third more of it fits, only where that pays, and schedules know who comes how."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_of import MACHINE, plan_of, source_of, spec_of

from zinfer.chunks.at_home import packed_forms, with_packed
from zinfer.chunks.pack import assemble
from zinfer.chunks.table import ALIGN
from zinfer.errors import BudgetError, UsageError
from zinfer.plan.explain import alternatives, explain
from zinfer.plan.make import Plan
from zinfer.plan.packing import packed_placement
from zinfer.plan.place import Reserve, place, tier_uses
from zinfer.plan.records import Budget, Compute, Evict, Fetch, Settle, Tier, Workload
from zinfer.plan.revise import moved_chunks, rebudget
from zinfer.plan.schedule import build_schedule, serial_schedule
from zinfer.plan.simulate import Simulator, fresh_bytes, with_packing
from zinfer.spec.lossless import WEIGHT_BYTES
from zinfer.spec.records import DTYPE_BYTES
from zinfer.units import MIB, Bytes

SPEC = spec_of("llama-3.2-1b", num_hidden_layers=8, vocab_size=4096, tie_word_embeddings=False)
TABLE = assemble(source_of(SPEC), 24 * MIB)  # an embedding table, then layers in parts, and a head
PACKABLE = replace(TABLE, packed=packed_forms(SPEC, TABLE))
TOTAL = sum(chunk.nbytes for chunk in TABLE.streamable)
WORK = Workload(batch=1, prompt_len=32, gen_len=64)
NO_RESERVE = Reserve()
# Packed weights are multiplied by our kernels alone: a machine that replays passes has them.
OURS = MACHINE.model_copy(update={"host": MACHINE.host.model_copy(update={"replayed_op_s": 1e-6})})
STREAMED = {"device": "cpu", "memory__host": "450MiB", "exact": False}


def both(host, spare=0):
    plain = place(PACKABLE, Budget(host), compute_tier=Tier.HOST, reserve=NO_RESERVE, lookahead=2)
    return plain, packed_placement(PACKABLE, plain, spare) if plain.slots else plain


def streamed_bytes(placement):
    return sum(chunk.nbytes for chunk in TABLE.streamable if not placement.resident(chunk.id))


def used(placement, host):
    return tier_uses(PACKABLE, placement, Budget(host), NO_RESERVE)[0].total


def test_a_packed_form_holds_every_weight_once_in_three_quarters_of_the_bytes():
    assert PACKABLE.packed.keys() == {chunk.id for chunk in TABLE.streamable}
    for number, form in PACKABLE.packed.items():
        published = TABLE.chunks[number]
        assert form.ops == published.ops and not form.reads and not form.moves
        share = WEIGHT_BYTES / DTYPE_BYTES["BF16"]
        assert form.weight_bytes == pytest.approx(share * published.weight_bytes, rel=0.01)
        end = 0
        for piece in form.tensors:
            assert piece.offset % ALIGN == 0 and piece.offset >= end
            end = piece.offset + piece.nbytes
        assert end <= form.nbytes < published.nbytes
        mixed = with_packed(SPEC, PACKABLE, [number])
        reads = {part.key for op in form.ops for part in mixed.program[op].reads}
        assert reads == {piece.key for piece in form.tensors}


def test_what_is_stored_otherwise_or_no_bfloat16_has_no_packed_form():
    assert packed_forms(replace(SPEC, weights="int8"), TABLE) == {}
    assert packed_forms(replace(SPEC, dtype="F32"), TABLE) == {}
    tied = spec_of("llama-3.2-1b", num_hidden_layers=1, vocab_size=4096, tie_word_embeddings=True)
    table = assemble(source_of(tied), 1)
    heads = {chunk.id for chunk in table.streamable if tied.program[chunk.ops[0]].kind == "head"}
    assert heads and not heads & packed_forms(tied, table).keys(), "its rows are looked up as they lie"


@settings(max_examples=200, deadline=None)
@given(st.floats(0.15, 1.2), st.integers(0, 40 * MIB))
def test_a_packed_placement_fits_wherever_the_plain_one_does_and_streams_less(share, spare):
    host = round(share * TOTAL)
    try:
        plain, packed = both(host, spare)
    except BudgetError:
        return
    if not plain.slots:
        assert packed is plain
        return
    assert used(packed, host) <= used(plain, host) + spare
    assert streamed_bytes(packed) <= streamed_bytes(plain)
    if plain.resident(TABLE.streamable[0].id) or streamed_bytes(plain) < 0.7 * TOTAL:
        assert streamed_bytes(packed) < streamed_bytes(plain)
    assert all(packed.resident(chunk) for chunk in packed.packed)
    assert all(TABLE.chunks[chunk].nbytes <= packed.slot_bytes for chunk in packed.packed)
    assert (packed.slots, packed.lookahead) == (plain.slots, plain.lookahead)


def test_where_all_fits_packed_no_more_are_packed_than_must_be():
    host = round(0.9 * TOTAL)
    plain, packed = both(host)
    assert streamed_bytes(plain) > 0
    assert streamed_bytes(packed) == 0
    assert 0 < len(packed.packed) < len(TABLE.streamable)
    all_packed = replace(packed, packed=frozenset(PACKABLE.packed))
    room = used(plain, host) - used(all_packed, host)
    most_saved = max(TABLE.chunks[number].nbytes - form.nbytes for number, form in PACKABLE.packed.items())
    assert room > 3 * most_saved, "all of them would leave memory idle"
    assert used(plain, host) - used(packed, host) < 2 * most_saved


@pytest.mark.parametrize("guests", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_each_packed_chunk_comes_through_a_slot_and_settles_once(share, guests):
    host = round(share * TOTAL)
    _, placement = both(host)
    waiting = tuple(sorted(placement.packed))[::2] if guests else ()
    placement = replace(placement, guests=waiting)
    schedule = build_schedule(PACKABLE, placement)
    assert Counter(step.chunk for step in schedule.first if isinstance(step, Settle)) == Counter(
        placement.packed - {*waiting}
    )
    assert Counter(step.chunk for step in schedule.second if isinstance(step, Settle)) == Counter(waiting)
    assert not any(isinstance(step, Settle) for step in schedule.steady)
    for steps in (schedule.first, schedule.second):
        fetched = [step for step in steps if isinstance(step, Fetch) and step.chunk in placement.packed]
        assert all(step.as_guest for step in fetched)
        free = placement.slots  # a slot for each that comes through one, never more than there are
        if steps is schedule.second:
            free -= min(placement.slots, sum(not placement.resident(chunk.id) for chunk in TABLE.streamable))
        through = placement.packed | {c.id for c in TABLE.streamable if not placement.resident(c.id)}
        for step in steps:
            if isinstance(step, Fetch) and (step.as_guest or step.chunk in through):
                free -= 1
            elif isinstance(step, Settle | Evict):
                free += 1
            assert free >= 0
        computed = [step.chunk for step in steps if isinstance(step, Compute)]
        assert computed == ([chunk.id for chunk in TABLE.streamable] if steps else [])
    serial = serial_schedule(PACKABLE, placement)
    assert {step.chunk for step in serial.first if isinstance(step, Settle)} == placement.packed
    # On the virtual clock memory never holds more than the plan says, and nothing is computed before it is there.
    for each in (schedule, serial):
        simulator = Simulator(PACKABLE, placement, MACHINE)
        for steps in (*each.loading, *[each.steady] * 2):
            run = simulator.run(steps, [1e-3] * len(TABLE.chunks))
            assert run.peak_bytes[Tier.HOST] <= used(placement, host) + placement.slot_bytes


def test_packing_takes_the_processor_in_the_pass_that_settles_and_finds_fewer_bytes():
    _, placement = both(round(0.4 * TOTAL))
    schedule = build_schedule(PACKABLE, placement)
    idle = [0.0] * len(TABLE.chunks)
    packing = with_packing(PACKABLE, idle, MACHINE, schedule.first)
    assert {number for number, seconds in enumerate(packing) if seconds} == placement.packed
    assert with_packing(PACKABLE, idle, MACHINE, schedule.steady) is idle
    measured = MACHINE.model_copy(update={"host": MACHINE.host.model_copy(update={"packing_s_per_gb": 0.25})})
    slower = with_packing(PACKABLE, idle, measured, schedule.first)
    assert sum(slower) == pytest.approx(0.25e-9 * sum(TABLE.chunks[c].weight_bytes for c in placement.packed))
    homes = sum(
        placement.at_home(PACKABLE, chunk.id).nbytes
        for chunk in TABLE.streamable
        if placement.resident(chunk.id)
    )
    assert fresh_bytes(PACKABLE, placement, schedule.first) == homes
    assert homes < sum(chunk.nbytes for chunk in TABLE.streamable if placement.resident(chunk.id))


def test_a_plan_packs_where_the_disk_binds_and_says_so():
    plan = plan_of(SPEC, WORK, OURS, **STREAMED)
    never = plan_of(SPEC, WORK, OURS, **STREAMED, runtime__pack="never")
    assert never.placement.packed == frozenset() and never.table.packed == {}
    assert plan.placement.packed
    assert plan.forecast.bytes_per_pass["disk"] < 0.95 * never.forecast.bytes_per_pass["disk"]
    assert plan.forecast.pass_s < 0.95 * never.forecast.pass_s
    assert plan.uses[0].total <= plan.budget.host
    published = sum(plan.table.chunks[chunk].nbytes for chunk in plan.placement.packed)
    assert f"{Bytes(published)} of what stays are packed into" in "\n".join(explain(plan))
    assert "packed into" not in "\n".join(explain(never))
    # More memory never looks worse beside it.
    for other in alternatives(SPEC, plan):
        if other.kind == "budgets" and Bytes.parse(other.flags.split()[1]) > plan.budget.host:
            assert other.pass_s <= plan.forecast.pass_s * 1.001


@pytest.mark.parametrize(
    ("machine", "work", "flags"),
    [
        (MACHINE, WORK, {}),  # none of our kernels
        (MACHINE, WORK, {"exact": True}),  # nor for exact products
        (OURS, WORK, {"memory__host": "20GiB"}),  # nothing streams
        (OURS, WORK, {"runtime__lookahead": 0}),  # the serial twin
        (OURS, replace(WORK, gen_len=1), {}),  # one pass: packing pays for nothing
        (OURS, Workload(batch=256, prompt_len=128, gen_len=2, num_requests=256), {}),  # computation binds
    ],
)
def test_elsewhere_weights_stay_as_they_are_published(machine, work, flags):
    plan = plan_of(SPEC, work, machine, **STREAMED | flags)
    assert plan.placement.packed == frozenset()


def test_exact_products_of_the_library_keep_their_weights_published():
    """Packed ones would be ours, with other bits; where nobody has asked the kernels the profile tells."""
    kinds = {op.kind for op in SPEC.program if op.matrix}
    ours = replace(SPEC, product_sizes=tuple((kind, ()) for kind in kinds))
    theirs = replace(SPEC, product_sizes=tuple((kind, (64,) if kind == "up" else ()) for kind in kinds))
    flags = STREAMED | {"exact": True}
    assert plan_of(SPEC, WORK, OURS, **flags).placement.packed
    assert plan_of(ours, WORK, OURS, **flags).placement.packed
    assert not plan_of(theirs, WORK, OURS, **flags).placement.packed
    assert plan_of(theirs, WORK, OURS, **flags | {"exact": False}).placement.packed


def test_a_saved_plan_packs_the_same_chunks(tmp_path):
    plan = plan_of(SPEC, WORK, OURS, **STREAMED)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json", source_of(SPEC), SPEC)
    assert loaded == plan
    with pytest.raises(UsageError, match=r"ZI-1010.*packs chunks"):
        Plan.load(tmp_path / "plan.json", source_of(SPEC))


def test_another_budget_packs_anew_and_counts_who_changes_form():
    plan = plan_of(SPEC, WORK, OURS, **STREAMED)
    more = rebudget(SPEC, plan, replace(plan.budget, host=plan.budget.host + 64 * MIB))
    assert len(more.placement.packed) > len(plan.placement.packed)
    assert set(moved_chunks(plan, more.placement)) == more.placement.packed - plan.placement.packed
    roomy = rebudget(SPEC, plan, replace(plan.budget, host=4 * TOTAL))
    assert roomy.placement.packed == frozenset() and not roomy.placement.slots
    assert set(moved_chunks(plan, roomy.placement)) == {chunk.id for chunk in plan.table.streamable} - {
        chunk.id
        for chunk in plan.table.streamable
        if plan.placement.resident(chunk.id) and chunk.id not in plan.placement.packed
    }
    unpacked = rebudget(SPEC, replace(plan, table=replace(plan.table, packed={})), plan.budget)
    assert unpacked.placement.packed == frozenset() and unpacked.placement.slots
