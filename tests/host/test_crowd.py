"""The idle team that keeps products from spinning while weights are read."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.memory import crowd as crowd_module
from zinfer.memory.crowd import CROWD, Crowd

LONG_S = 600.0  # nothing here waits so long


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(2**20).sum()  # this thread's own team
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_crowd():
    """Crowds whose threads end with the test."""
    made = []

    def make(linger_s=LONG_S):
        made.append(Crowd(linger_s))
        made[-1].hold()
        return made[-1]

    yield make
    for crowd in made:
        while crowd._holders > 0:
            crowd.let_go()


def tasks():
    return {task.name for task in Path("/proc/self/task").iterdir()}


def eventually(holds):
    while not holds():
        time.sleep(0.001)


def test_a_crowd_is_there_from_the_first_read_until_its_last_holder_goes(two_threads, make_crowd):
    before = tasks()
    crowd = make_crowd()
    assert not crowd.is_there
    crowd.hold()
    crowd.enter()
    crowd.enter()
    assert crowd.is_there
    crowd.let_go()
    assert crowd.is_there
    crowd.let_go()
    assert not crowd.is_there
    assert not [thread for thread in threading.enumerate() if thread.name == "zinfer-crowd"]
    eventually(lambda: tasks() <= before)  # libgomp's own threads end after the one whose team they were


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch has no OpenMP")
def test_it_is_a_team_of_more_than_one_thread(two_threads, make_crowd):
    before = tasks()
    make_crowd().enter()
    eventually(lambda: len(tasks() - before) >= 2)


def test_without_a_holder_nobody_comes(two_threads):
    crowd = Crowd(LONG_S)
    crowd.enter()
    assert not crowd.is_there


@pytest.mark.parametrize("threads", [1, 9])
def test_nobody_comes_where_cores_are_not_shared(threads, two_threads, make_crowd, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    crowd = make_crowd()
    crowd.enter()
    assert not crowd.is_there


def test_it_goes_when_nothing_is_read_any_more_and_comes_again(two_threads, make_crowd):
    crowd = make_crowd(linger_s=0.001)
    for _ in range(3):
        crowd.enter()
        eventually(lambda: not crowd.is_there)


def test_it_stays_as_long_as_a_stream_pauses(make_crowd, monkeypatch):
    clock = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(crowd_module, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # no thread of its own: only the clock moves
    crowd = make_crowd(linger_s=0.25)
    stays = []
    for pause_s in (0.0, 0.0625, 0.3125, 0.375, 0.0625, 8.0, 2.0):
        clock.now_s += pause_s
        crowd.enter()
        stays.append(crowd.stay_s)
    # After a longer pause it is another load, or a stream whose steps are worth a new team.
    assert stays == [0.25, 0.25, 0.625, 0.25, 0.25, 0.25, 0.25]


def test_holders_come_and_go_in_many_threads(two_threads, make_crowd):
    crowd = make_crowd(linger_s=0.0005)
    crowd.let_go()

    def turns():
        for _ in range(50):
            crowd.hold()
            crowd.enter()
            crowd.let_go()

    threads = [threading.Thread(target=turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crowd._holders == 0
    eventually(lambda: not crowd.is_there)


def test_products_have_the_same_bits_in_a_crowd(two_threads, make_crowd):
    draw = torch.Generator().manual_seed(0)
    cases = [
        (torch.randn(rows, 512, generator=draw).to(dtype), torch.randn(768, 512, generator=draw).to(dtype))
        for rows in (1, 2, 33)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    alone = [F.linear(x, weight) for x, weight in cases]
    crowd = make_crowd()
    crowd.enter()
    assert crowd.is_there
    assert all(map(torch.equal, alone, (F.linear(x, weight) for x, weight in cases)))


def test_an_engine_that_reads_has_a_crowd_and_leaves_none(two_threads, tmp_path, monkeypatch):
    monkeypatch.setattr(CROWD, "_linger_s", LONG_S)
    monkeypatch.setattr(CROWD, "_stay_s", LONG_S)
    folder = write_tiny("llama", tmp_path / "llama")
    seen = []
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    with LLM(folder, device="cpu", memory={"host": "1GiB"}, threads=2, machine="sim-default") as llm:
        llm.generate([[5, 6, 7]], params, progress=lambda *_: seen.append(CROWD.is_there))
        assert CROWD._holders > 0
    assert seen[0]
    assert not CROWD.is_there
    assert CROWD._holders == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("zinfer")]
