"""A group on a device counts against the device's budget; the device is made up, its tensors stay on the host."""

import pytest
import torch
from student_groups import COUNT, write_group_folder

from zinfer.config.load import load_settings
from zinfer.errors import BudgetError, MachineError
from zinfer.plan.records import Tier
from zinfer.students import serving
from zinfer.students.bank import StudentBank
from zinfer.students.opening import open_scheduler
from zinfer.students.serving import GroupService

GIB = 2**30


@pytest.fixture
def folder(tmp_path):
    return write_group_folder(tmp_path / "group")


@pytest.fixture
def device(monkeypatch):
    """One CUDA device of 8 GiB, of which 6 are free; what is put there is noted and stays where it is."""
    placed, warmed = [], []

    class Noted(StudentBank):
        def __init__(self, group, device="cpu"):
            placed.append(device)
            super().__init__(group, "cpu")

        def warm_up(self, students):
            warmed.append(list(students))

    monkeypatch.setattr(serving, "StudentBank", Noted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda at=0: (6 * GIB, 8 * GIB))
    return placed, warmed


def settings(**flags):
    return load_settings(
        None, flags={"machine": "sim-default", "runtime.threads": 1, "memory.host": "1GiB"} | flags
    ).settings


def test_its_bytes_come_off_the_devices_budget(folder, device):
    given = settings(device="cuda:0", **{"memory.device": "2GiB"})
    service = GroupService(folder, given)
    assert device[0] == ["cuda:0"]
    assert service.ledger.tier is Tier.DEVICE
    assert service.ledger.capacity_bytes == 2 * GIB
    service.ledger.check()
    assert service.ledger.reserved["students"] >= service.bank.nbytes
    left = service.beside(given)
    assert left.memory.device == service.ledger.free_bytes < 2 * GIB - service.bank.nbytes
    assert left.memory.host == given.memory.host, "the host's is untouched"
    service.close()


def test_in_host_memory_the_hosts(folder, device):
    given = settings(device="cpu")
    service = GroupService(folder, given)
    assert device[0] == ["cpu"]
    left = service.beside(given)
    assert left.memory.host == service.ledger.free_bytes < GIB
    assert left.memory.device == given.memory.device
    service.close()


def test_without_a_word_the_device_is_taken_and_a_share_of_what_is_free(folder, device):
    service = GroupService(folder, settings())
    assert device[0] == ["cuda:0"]
    assert 5 * GIB < service.ledger.capacity_bytes <= 6 * GIB
    service.close()


def test_one_that_does_not_fit_is_refused_with_what_does(folder, device):
    given = {"device": "cuda:0", "memory.device": "64KiB"}
    for _ in range(4):  # each refusal names the sum up to the part that did not fit
        try:
            GroupService(folder, settings(**given)).close()
            break
        except BudgetError as error:
            assert error.code == "ZI-2401"
            given["memory.device"] = error.remedy.split("--device-mem ")[1]
    else:
        pytest.fail("following the remedy ends")


def test_a_device_that_is_not_there(folder, device):
    with pytest.raises(MachineError, match="ZI-5001"):
        GroupService(folder, settings(device="cuda:3"))
    with pytest.raises(MachineError, match="ZI-5342"):
        GroupService(folder, settings(device="cpu"), devices=("cuda:0", "cuda:1"))


def test_a_scheduler_records_every_number_of_students_before_it_serves(folder, device):
    service = GroupService(folder, settings(device="cuda:0"))
    with open_scheduler(service):
        assert device[1] == [list(range(1, COUNT + 1))]
    service.close()
    host = GroupService(folder, settings(device="cpu"))
    with open_scheduler(host):
        assert len(device[1]) == 1, "in host memory there is nothing to record"
    host.close()
