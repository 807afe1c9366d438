"""Chunks that pass through a slot first and come to stay with the second pass: the same bits, the books balanced."""

from collections import Counter
from dataclasses import replace

import chunk_files
import pytest
import torch
from tiny_models import streaming_bytes, write_tiny

from zinfer import LLM, SamplingParams
from zinfer.chunks.table import HUGE_PAGE, PAGE
from zinfer.config.profiles import load_machine
from zinfer.errors import InternalError, MachineError
from zinfer.memory import nvme
from zinfer.memory.assemble import open_manager
from zinfer.memory.ledger import Ledger
from zinfer.memory.slab import HostSlab
from zinfer.memory.tier import TierMemory
from zinfer.plan.records import Budget, Fetch, Tier

PROMPT = [5, 9, 200, 31, 7, 44]
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


@pytest.fixture
def folder(tmp_path):
    return write_tiny("llama", tmp_path / "m", hidden_size=128, intermediate_size=512, num_hidden_layers=8)


def profile(tmp_path, fresh):
    """A machine whose untouched memory comes at `fresh` bytes/s (None: at no cost)."""
    path = tmp_path / f"{fresh}.json"
    path.write_text(
        load_machine("sim-default").model_copy(update={"fresh_bytes_per_s": fresh}).model_dump_json()
    )
    return str(path)


def options(folder, tmp_path, fresh=1e6, **more):
    fixed = {
        "device": "cpu",
        "threads": 1,
        "machine": profile(tmp_path, fresh),
        "lookahead": 1,
        "graphs": "off",
    } | more
    return fixed | {"memory": {"host": streaming_bytes(folder, PROMPT, PARAMS, **fixed)}}


def tokens_of(llm):
    return llm.generate([PROMPT], PARAMS)[0].outputs[0].token_ids


@pytest.mark.parametrize("exact", [True, False])
def test_guests_change_no_bit_and_are_read_twice(folder, tmp_path, exact):
    with LLM(folder, **options(folder, tmp_path, None, exact=exact)) as llm:
        wanted, logits = tokens_of(llm), llm.logits(PROMPT)
        assert llm.plan.placement.guests == ()
    with LLM(folder, **options(folder, tmp_path, exact=exact)) as llm:
        assert tokens_of(llm) == wanted
        plan, stats, manager = llm.plan, llm.stats, llm._session._engine.manager
        guests = plan.placement.guests
        assert guests, "without guests this compares nothing"
        steps = [*plan.schedule.first, *plan.schedule.second, *plan.schedule.steady * 3]
        fetches = Counter(step.chunk for step in steps if isinstance(step, Fetch))
        assert all(fetches[guest] == 2 for guest in guests)
        assert manager.stats().num_fetches == fetches.total(), "read with both passes, and then no more"
        assert [done.is_first for done in stats.passes] == [True, True, False, False, False]
        assert stats.surprises == 0
        assert stats.peak_bytes[Tier.HOST] <= plan.budget.host
        memory = manager._memory.tiers[Tier.HOST]
        assert all(memory.is_home(guest) for guest in guests)
        manager.check()
        assert torch.equal(llm.logits(PROMPT), logits)


def test_a_read_that_fails_in_either_pass_is_told_and_the_next_pass_begins_anew(
    folder, tmp_path, monkeypatch
):
    settings = options(folder, tmp_path)
    with LLM(folder, **settings) as llm:
        wanted = tokens_of(llm)
    for failing in (1, 2):
        with LLM(folder, **settings) as llm:
            llm.fit([PROMPT], PARAMS)
            assert llm.plan.placement.guests
            guest = llm.plan.placement.guests[0]
            seen = []
            real = nvme.Reader._read

            def read(reader, fetch, number, piece, seen=seen, guest=guest, real=real, failing=failing):
                seen.append(fetch.ticket.chunk.id)
                if fetch.ticket.chunk.id == guest and seen.count(guest) == failing:
                    raise MachineError("ZI-5321", "the disk has a bad moment", remedy="again")
                real(reader, fetch, number, piece)

            monkeypatch.setattr(nvme.Reader, "_read", read)
            with pytest.raises(MachineError, match="ZI-5321"):
                llm.generate([PROMPT], PARAMS)
            monkeypatch.undo()
            assert seen.count(guest) == failing
            manager = llm._session._engine.manager
            manager.check()
            assert tokens_of(llm) == wanted
            manager.check()
            assert manager._memory.tiers[Tier.HOST].is_home(guest)


def test_a_budget_that_changes_while_guests_wait_is_followed(folder, tmp_path):
    settings = options(folder, tmp_path)
    with LLM(folder, **settings) as llm:
        wanted = tokens_of(llm)
    with LLM(folder, **settings) as llm:
        texts = iter(llm._session.run(llm._jobs(llm._requests([PROMPT], PARAMS))))
        found = [next(texts).token_id]
        guests = llm.plan.placement.guests
        assert guests
        llm.set_memory(host=settings["memory"]["host"] + 2**20)
        assert llm.plan.placement.guests == ()
        found += [event.token_id for event in texts]
        assert found == wanted
        llm._session._engine.manager.check()


PAGES = [1, 3, 2, 3, 1, 2, 3]


@pytest.fixture
def manager(tmp_path):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    placement = replace(chunk_files.cpu_placement(table, (0, 4), 2), guests=(0, 4))
    budget = Budget(host=chunk_files.needed_bytes(table, placement, Tier.HOST))
    manager = open_manager(table, placement, budget)
    manager.contents = contents
    yield manager
    manager.check()
    manager.close()


def shows(manager, number):
    with manager.lease(number) as lease:
        return (
            chunk_files.bytes_of(lease, manager.table.chunks[number]) == manager.contents[number]
        ), lease.address


def test_a_guest_takes_a_slot_and_leaves_its_home_empty(manager):
    homes = manager._memory.tiers[Tier.HOST]._homes
    manager.prefetch(0, as_guest=True)
    is_right, address = shows(manager, 0)
    assert is_right
    assert address not in [offset for offset, _ in homes.values()]
    assert manager.ledger().held == {0: manager.placement.slot_bytes}
    manager.prefetch(1)
    with pytest.raises(InternalError, match=r"ZI-5401.*no place for chunk 4"):
        manager.prefetch(4, as_guest=True)
    manager.prefetch(4)  # into its home
    assert shows(manager, 4) == (True, homes[4][0])
    manager.evict(0)
    manager.prefetch(2)
    manager.prefetch(0)
    assert shows(manager, 0) == (True, homes[0][0])
    assert shows(manager, 2)[0]


def test_after_an_error_a_guest_goes_as_streamed_chunks_do(manager):
    manager.prefetch(0, as_guest=True)
    manager.prefetch(4)
    assert shows(manager, 4)[0]
    manager.drop_streamed()
    assert set(manager.ledger().held) == {4}
    manager.check()


def test_a_guest_that_is_at_home_answers_from_there(manager):
    ticket = manager.prefetch(0)
    assert manager.prefetch(0, as_guest=True) is ticket
    assert shows(manager, 0)[0]


def test_the_finder_of_pages_leaves_the_homes_of_guests_alone(tmp_path, monkeypatch):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    placement = replace(chunk_files.cpu_placement(table, (0, 4), 2), guests=(4,))
    budget = Budget(host=chunk_files.needed_bytes(table, placement, Tier.HOST))
    left = []
    monkeypatch.setattr(HostSlab, "find_ahead", lambda slab, nbytes, unused: left.append(unused))
    manager = open_manager(table, placement, budget)
    memory = manager._memory.tiers[Tier.HOST]
    homes, blocks = memory._homes, memory._arena.blocks()
    assert left == [[homes[4]]]
    manager.prefetch(0)
    manager.prefetch(4, as_guest=True)
    manager.evict(4)
    assert len(left) == 1
    manager.prefetch(4)  # comes home: from now on its home is found, and nothing else is touched
    assert left[1:] == [[block for block in blocks if block != homes[4]]]
    manager.evict(4)
    manager.prefetch(4)
    assert len(left) == 2
    manager.close()


@pytest.mark.parametrize("already", [False, True])
def test_finding_the_homes_of_guests_stores_into_nothing_that_holds_a_chunk(already):
    """With real pages, and chunks that begin in the middle of one."""
    homes = {0: 3 * HUGE_PAGE, 1: 2 * HUGE_PAGE + PAGE, 2: HUGE_PAGE, 3: 2 * HUGE_PAGE}
    slab = HostSlab(sum(homes.values()) + 2 * HUGE_PAGE)
    memory = TierMemory(Ledger(Tier.HOST, len(slab.bytes_N)), slab, homes, 1, 2 * HUGE_PAGE)

    def put(chunk, **kind):
        memory.take(chunk, **kind)
        memory.bytes_of(chunk).fill_(chunk + 1)

    memory.find_ahead(1, guests=(1, 2, 3))
    put(0)
    put(2, as_guest=True)
    memory.give_back(2)
    if already:  # as after an error in the second pass
        put(3)
    put(1)
    put(4)  # in the slot
    assert slab._ahead is not None
    slab._ahead._thread.join()
    if not already:
        put(3)
    put(2)
    for chunk in range(5):
        assert memory.bytes_of(chunk).eq(chunk + 1).all()
    memory.check()
    memory.close()


def test_a_finder_that_knows_no_chunks_would_be_seen():
    slab = HostSlab(4 * HUGE_PAGE)
    memory = TierMemory(Ledger(Tier.HOST, 4 * HUGE_PAGE), slab, {0: 2 * HUGE_PAGE, 1: 2 * HUGE_PAGE}, 0, 0)
    memory.take(0)
    memory.bytes_of(0).fill_(1)
    memory._find_all_but(())
    slab._ahead._thread.join()
    assert not memory.bytes_of(0).eq(1).all()
    memory.close()


def test_a_schedule_with_guests_names_each_of_them_as_one(folder, tmp_path):
    with LLM(folder, **options(folder, tmp_path)) as llm:
        plan = llm.fit([PROMPT], PARAMS)
        first = {step.chunk for step in plan.schedule.first if isinstance(step, Fetch) and step.as_guest}
        assert first == set(plan.placement.guests)
