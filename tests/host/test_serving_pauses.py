"""The collector passes over what a server has loaded, and over nothing more, and only while it serves."""

import gc
import weakref

import pytest

from zinfer.serving.pauses import few_pauses


class Node:
    """Something that refers to itself, so that only a collection frees it."""

    def __init__(self):
        self.itself = self


@pytest.fixture(autouse=True)
def _nothing_else_collects():
    was_on = gc.isenabled()
    gc.disable()
    yield
    if was_on:
        gc.enable()
    assert gc.get_freeze_count() == 0


def test_what_was_there_is_not_looked_at_and_what_comes_is_collected():
    with few_pauses() as settle:
        loaded = Node()
        settle()
        assert gc.get_freeze_count() > 1000, "modules and all"
        kept, later = weakref.ref(loaded), Node()
        gone = weakref.ref(later)
        del loaded, later
        gc.collect()
        assert gone() is None
        assert kept() is not None, "it is passed over, so it costs no time"
    gc.collect()
    assert kept() is None, "after the end it is collected as ever"


def test_what_is_no_more_is_collected_before_it_could_be_kept():
    node = Node()
    gone = weakref.ref(node)
    with few_pauses() as settle:
        del node
        settle()
        assert gone() is None


def test_a_server_that_fails_gives_the_collector_back():
    with pytest.raises(KeyError), few_pauses() as settle:
        settle()
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_without_settling_nothing_is_frozen():
    with few_pauses():
        assert gc.get_freeze_count() == 0
