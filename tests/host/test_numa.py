"""Near a device: what sysfs says, for machines with several nodes; elsewhere nothing happens."""

import os
import threading

import pytest
import torch

from zinfer.memory.numa import Near, near_address, near_device
from zinfer.memory.slab import HostSlab

ADDRESS = "0000:17:00.0"


def machine(folder, *, nodes=2, node="1", cores="0-3,8,10-11"):
    """A /sys with that many nodes and one device."""
    for number in range(nodes):
        place = folder / f"devices/system/node/node{number}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(cores + "\n" if number == 1 else "4-7\n")
    device = folder / "bus/pci/devices" / ADDRESS
    device.mkdir(parents=True)
    (device / "numa_node").write_text(node + "\n")
    return folder


def test_a_device_on_the_second_node(tmp_path):
    near = near_address(ADDRESS, machine(tmp_path))
    assert near == Near(1, frozenset({0, 1, 2, 3, 8, 10, 11}))


def test_the_address_may_be_written_in_capitals(tmp_path):
    (machine(tmp_path) / "bus/pci/devices" / ADDRESS).rename(tmp_path / "bus/pci/devices/0000:ca:00.0")
    assert near_address("0000:CA:00.0", tmp_path).node == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"nodes": 1, "node": "0"},
        {"node": "-1"},
        {"node": "many"},
        {"node": "70"},
        {"node": "5"},
        {"cores": "x"},
    ],
)
def test_where_nothing_is_shown_nothing_happens(tmp_path, changes):
    assert near_address(ADDRESS, machine(tmp_path, **changes)) == Near()


def test_no_such_device_and_no_sysfs(tmp_path):
    assert near_address("0000:99:00.0", machine(tmp_path / "a")) == Near()
    assert near_address(ADDRESS, tmp_path / "b") == Near()


def test_without_cuda_nothing_is_near():
    assert near_device(torch.device("cuda:7")) == Near()


def in_a_thread(run):
    found = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_is_bound_and_its_starter_is_not():
    mine = os.sched_getaffinity(0)
    core = min(mine)

    def bound():
        Near(0, frozenset({core, 4000})).bind_thread()
        return os.sched_getaffinity(0)

    assert in_a_thread(bound) == {core}
    assert os.sched_getaffinity(0) == mine


@pytest.mark.parametrize("near", [Near(), Near(1, frozenset({4000}))])
def test_cores_that_the_process_may_not_use_change_nothing(near):
    def bound():
        near.bind_thread()
        return os.sched_getaffinity(0)

    assert in_a_thread(bound) == os.sched_getaffinity(0)


def test_memory_of_this_machines_node_and_of_none():
    slab = HostSlab(8 * 4096)
    address = slab.bytes_N.data_ptr()
    assert not Near().bind_memory(address, 4096)
    Near(62).bind_memory(address, 4096)  # there is no such node: whatever is answered, nothing is said
    Near(0).bind_memory(address, 8 * 4096)  # node 0 is everywhere; a sandbox may refuse all the same
    slab.bytes_N.fill_(3)
    assert slab.bytes_N.sum() == 3 * 8 * 4096
    slab.close()
