"""While requests run the collector passes over what was there before, and only then."""

import gc
import weakref

import pytest
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.api import DEMO
from zinfer.runtime.garbage import OLD_OBJECTS

FIXED = {"device": "cpu", "machine": "sim-default", "threads": 1, "memory": {"host": "1GiB"}}
PARAMS = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture
def llm(tmp_path):
    with LLM(write_tiny("llama", tmp_path / "model"), **FIXED) as opened:
        yield opened


class Node:
    pass


def cycle():
    node = Node()
    node.itself = node
    return weakref.ref(node)


def test_old_objects_are_passed_over_while_requests_run(llm):
    seen = []
    assert gc.get_freeze_count() == 0
    llm.generate([[5, 6, 7], [8, 9]], PARAMS, progress=lambda *_: seen.append(gc.get_freeze_count()))
    assert seen[0] > 10_000, "those of torch alone are more"
    assert gc.get_freeze_count() == 0


def test_a_stream_that_nobody_ends_and_an_engine_that_closes_let_go():
    with LLM(DEMO, **FIXED) as llm:
        stream = llm.stream("def", PARAMS)
        next(stream)
        assert gc.get_freeze_count() > 0
        stream.close()
        assert gc.get_freeze_count() == 0
        other = llm.stream("def", PARAMS)
        next(other)
    assert gc.get_freeze_count() == 0


def test_what_a_run_leaves_behind_is_collected(llm):
    before, during = cycle(), []

    def watch(*_):
        during.append(cycle())
        gc.collect()

    llm.generate([[5, 6, 7]], PARAMS, progress=watch)
    assert [ref() for ref in during] == [None] * len(during), "young garbage goes at once"
    gc.collect()
    assert before() is None


def test_the_last_of_several_lets_go_and_what_others_froze_stays():
    OLD_OBJECTS.hold()
    OLD_OBJECTS.hold()
    OLD_OBJECTS.let_go()
    assert gc.get_freeze_count() > 0
    OLD_OBJECTS.let_go()
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        OLD_OBJECTS.hold()
        OLD_OBJECTS.let_go()
        assert gc.get_freeze_count() == count
    finally:
        gc.unfreeze()
