"""Engines of a benchmark by turns: one works at a time, in order, and who ends or dies holds nobody up."""

import threading
import time

import pytest
from bench_modules import load

turn = load("engines.turn")


def play(folder, weights, passes, dying=()):
    """Each engine makes so many passes, `per turn` at a time; the order in which passes were made."""
    order = turn.Order(folder, turn.order_of(weights))
    order.begin()
    made, working, most = [], [0], [0]
    lock = threading.Lock()

    def work(name, total, per_turn):
        mine = turn.turn_of({"turn": turn.options_of(order, name, per_turn)})
        try:
            mine.wait()
            for number in range(total):
                with lock:
                    working[0] += 1
                    most[0] = max(most[0], working[0])
                time.sleep(0.001)
                made.append(name)
                with lock:
                    working[0] -= 1
                if name in dying and number == 1:
                    return
                mine.passed(number + 1)
        finally:
            order.leave(name)

    threads = [threading.Thread(target=work, args=(name, *passes[name])) for name, _ in weights]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "somebody waits for ever"
    assert most[0] == 1, "one at a time"
    return made


def test_each_has_its_turns_in_order_and_its_passes_a_turn(tmp_path):
    made = play(tmp_path, [("a", 2), ("b", 2), ("c", 1)], {"a": (8, 2), "b": (12, 3), "c": (2, 1)})
    assert made == [*"aabbbcaabbbaabbbcaabbb"]


@pytest.mark.parametrize("dying", ["a", "b", "c"])
def test_who_ends_or_dies_is_passed_over(tmp_path, dying):
    passes = {"a": (6, 2), "b": (9, 1), "c": (3, 3)}
    made = play(tmp_path, [("a", 1), ("b", 1), ("c", 1)], passes, dying=dying)
    for name, (total, _) in passes.items():
        assert made.count(name) == (2 if name == dying else total)


def test_a_folder_is_used_again(tmp_path):
    for _ in range(2):
        assert play(tmp_path, [("a", 1), ("b", 1)], {"a": (2, 1), "b": (2, 1)}) == [*"abab"]


def test_without_others_nobody_waits():
    alone = turn.turn_of({})
    alone.wait()
    alone.passed(1)
    assert alone.waited_s == 0


def test_a_turn_counts_what_it_waited(tmp_path):
    order = turn.Order(tmp_path, ("a", "b"))
    order.begin()
    mine = turn.Turn("b", 1, order)
    threading.Timer(0.05, order.move_on).start()
    mine.wait()
    assert mine.waited_s > 0
