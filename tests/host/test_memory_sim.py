"""The simulated device: paced links, a timeline, real copies or none, staging in the order of issue."""

from itertools import accumulate

import chunk_files
import pytest

from zinfer.config.machine import Link
from zinfer.errors import InternalError
from zinfer.memory import nvme, sim
from zinfer.memory.assemble import open_manager
from zinfer.memory.links import LinkLog, Movement
from zinfer.plan.records import Budget, Tier

PAGES = [4, 4, 4, 4, 4, 4]


def open_sim(table, machine=chunk_files.FAST, *, staging=1, host=(), slots=6, **options):
    placement = chunk_files.sim_placement(table, (), host, slots, staging)
    budget = Budget(*(chunk_files.needed_bytes(table, placement, tier) for tier in (Tier.HOST, Tier.DEVICE)))
    return open_manager(table, placement, budget, device="sim", machine=machine, **options)


def test_the_timeline_says_what_moved_when(tmp_path):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_sim(table, staging=1)
    for number in range(6):
        manager.prefetch(number)  # five of them wait for the one staging slot, not we
    for number in range(6):
        manager.lease(number).release()
    movements = manager.log.drain()
    assert manager.log.drain() == []
    lanes = {link: [m for m in movements if m.link == link] for link in ("disk", "h2d")}
    for lane in lanes.values():
        assert [movement.chunk for movement in lane] == list(range(6))
        assert [movement.nbytes for movement in lane] == [chunk.nbytes for chunk in table.chunks]
        assert all(movement.begin_s <= movement.end_s for movement in lane)
    for read, copy in zip(lanes["disk"], lanes["h2d"], strict=True):
        assert read.end_s <= copy.begin_s
    for copy, read in zip(lanes["h2d"], lanes["disk"][1:], strict=False):
        assert copy.end_s <= read.begin_s  # one staging slot: nothing overlaps
    manager.close()


@pytest.mark.parametrize("link", ["disk", "h2d"])
def test_transfers_end_when_the_links_rate_says(tmp_path, monkeypatch, link):
    """On a clock that stands still: each piece of a paced link is due one after another, plus the latency."""
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    slow = Link(bytes_per_s=1000.0, latency_s=0.5)
    name = {"disk": "disk_read", "h2d": "h2d"}[link]
    waits = {"disk": [], "h2d": []}
    monkeypatch.setattr("zinfer.memory.links.time.perf_counter", lambda: 7.0)
    monkeypatch.setattr(nvme, "sleep_until", waits["disk"].append)
    monkeypatch.setattr(sim, "sleep_until", waits["h2d"].append)
    manager = open_sim(table, chunk_files.FAST.model_copy(update={name: slow}), staging=2)
    for number in range(6):
        manager.prefetch(number)
    for number in range(6):
        manager.lease(number).release()
    pieces = [piece for chunk in table.chunks for piece in nvme.joined(chunk.reads)]
    sizes = [sum(read.nbytes for read in piece) for piece in pieces]
    if link == "h2d":
        sizes = [chunk.nbytes for chunk in table.chunks]
    assert sorted(waits[link]) == pytest.approx([7.5 + nbytes / 1000 for nbytes in accumulate(sizes)])
    manager.close()


def test_host_memory_is_read_once_and_copied_each_time(tmp_path):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_sim(table, host=range(6), staging=0, slots=2)
    for _ in range(3):
        for chunk in table.chunks:
            manager.prefetch(chunk.id)
            with manager.lease(chunk.id) as lease:
                assert chunk_files.bytes_of(lease, chunk) == contents[chunk.id]
            manager.evict(chunk.id)
    total = sum(chunk.nbytes for chunk in table.chunks)
    assert manager.stats().link_bytes == {"disk": total, "h2d": 3 * total}
    manager.close()


def test_alias_mode_paces_and_does_not_copy_twice(tmp_path, monkeypatch):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_sim(table, host=range(6), staging=0, slots=1, sim_mode="alias")
    shown = []
    for chunk in table.chunks:
        manager.prefetch(chunk.id)
        with manager.lease(chunk.id) as lease:
            shown.append(chunk_files.bytes_of(lease, chunk))
        manager.evict(chunk.id)
    assert shown == [contents[0]] * 6  # the first tenant's bytes, and no poison
    assert manager.stats().link_bytes["h2d"] == sum(chunk.nbytes for chunk in table.chunks)
    manager.close()


def test_a_failing_copy_surfaces_and_frees_its_staging_slot(tmp_path, monkeypatch):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_sim(table, staging=1)
    real = sim.sleep_until

    def broken(due_s):
        raise MemoryError("the copy engine is on fire")

    monkeypatch.setattr(sim, "sleep_until", broken)
    with pytest.raises(MemoryError, match="on fire"):
        manager.lease(0)
    manager.check()
    monkeypatch.setattr(sim, "sleep_until", real)
    for number in range(6):
        with manager.lease(number) as lease:
            assert chunk_files.bytes_of(lease, table.chunks[number]) == contents[number]
    manager.close()


def test_the_log_keeps_bytes_when_it_forgets_movements():
    log = LinkLog()
    for number in range(70_000):
        log.add(Movement("disk", number, 2, 0.0, 1.0))
    assert log.num_bytes == {"disk": 140_000}
    assert len(log.drain()) == 65_536


def test_a_chunk_that_can_come_by_no_way_is_an_error_not_a_wait(tmp_path):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_sim(table, staging=0)
    with pytest.raises(InternalError, match=r"ZI-5404.*chunk 2"):
        manager.lease(2)
    manager.check()
    manager.close()
