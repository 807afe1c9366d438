"""Shares over CUDA links on real hardware: the file's bytes under delays, with one GPU in two roles or with several."""

import gc
import random

import chunk_files
import pytest
import torch
from chunk_passes import summed_passes
from links_of import with_links

from zinfer.memory import cuda_shares
from zinfer.memory.assemble import open_manager
from zinfer.memory.measure_devices import CudaLinks
from zinfer.memory.slab import DeviceSlab
from zinfer.parallel import aggregate, topology
from zinfer.plan.records import Budget, Tier

pytestmark = pytest.mark.gpu

PAGES = [200, 300, 100, 300, 200, 300, 250, 120]
DELAY_CYCLES = 20_000_000  # about 10 ms of a stream's time


@pytest.fixture(params=["one in two roles", "all there are"])
def num_devices(request, monkeypatch):
    """Two links: with one GPU its memory also stands for the further device's, so that streams and events are real."""
    if request.param == "all there are":
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU: what several do between them cannot be tested here")
        return torch.cuda.device_count()
    here = torch.device("cuda", 0)
    monkeypatch.setattr(aggregate, "DeviceSlab", lambda nbytes, device: DeviceSlab(nbytes, here))
    return 2


def open_shared(table, num_devices):
    machine = with_links(chunk_files.FAST, [1e12] * num_devices)
    placement = chunk_files.sim_placement(table, (0,), (2, 5), 3, 2)
    budget = Budget(*(chunk_files.needed_bytes(table, placement, tier) for tier in (Tier.HOST, Tier.DEVICE)))
    make = aggregate.by_several_links(table, placement, budget, machine, "cuda:0")
    return open_manager(table, placement, budget, device="cuda:0", make_transfer=make)


def test_every_pass_shows_the_files_bytes_and_every_link_brought_some(tmp_path, num_devices):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES, shift=8, piece=64 * 4096)
    manager = open_shared(table, num_devices)
    assert summed_passes(manager) == [sum(content) for content in contents] * 4
    manager.close()
    moved = manager.log.num_bytes
    for at in range(1, num_devices):
        assert moved[f"h2d:{at}"] == moved[f"peer:{at}"] > 0


@pytest.mark.parametrize("seed", range(4))
def test_random_delays_on_every_stream_change_nothing(tmp_path, monkeypatch, num_devices, seed):
    chance, copy = random.Random(seed), cuda_shares._timed_copy

    def slow_copy(stream, target_N, source_N, after):
        if chance.random() < 0.5:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(int(chance.random() * DELAY_CYCLES))
        return copy(stream, target_N, source_N, after)

    def compute():
        if chance.random() < 0.3:
            torch.cuda._sleep(int(chance.random() * DELAY_CYCLES))

    monkeypatch.setattr(cuda_shares, "_timed_copy", slow_copy)
    table, contents = chunk_files.write_chunks(tmp_path, PAGES, seed=seed)
    manager = open_shared(table, num_devices)
    assert summed_passes(manager, passes=3, between=compute) == [sum(content) for content in contents] * 3
    manager.close()


def test_computation_that_does_not_wait_for_the_second_link_is_seen(tmp_path, monkeypatch, num_devices):
    """The mutation: only the first share's mark is waited for, and the others' copies are late."""
    copy = cuda_shares._timed_copy

    def late_copy(stream, target_N, source_N, after):
        if source_N.is_cuda:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(DELAY_CYCLES)
        return copy(stream, target_N, source_N, after)

    def ready(self, ticket):
        torch.cuda.current_stream(self.device).wait_event(ticket.arrival[0])

    monkeypatch.setattr(cuda_shares, "_timed_copy", late_copy)
    monkeypatch.setattr(cuda_shares.CudaShares, "ready", ready)
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_shared(table, num_devices)
    assert summed_passes(manager, passes=2) != [sum(content) for content in contents] * 2
    manager.close()


def test_links_are_measured_and_everything_goes_back():
    """With one GPU there is one link, and its own rate is measured all the same."""
    gc.collect()  # of a test before this one that failed
    count, before = torch.cuda.device_count(), torch.cuda.memory_allocated()
    with CudaLinks(count, 2**24) as links:
        assert all(links.own(device) > 1e8 for device in range(count))
        assert all(rate > 1e8 for rate in links.pull(range(count)))
    assert torch.cuda.memory_allocated() == before
    assert len(topology.cuda_links(num_devices=count)) == (count if count > 1 else 0)
