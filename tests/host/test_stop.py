"""Stop strings across any cut of the text, and the order of the reasons to end."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zinfer.sampling.params import SamplingParams
from zinfer.sampling.stop import StopScanner, ending

TEXT = st.text("abc", max_size=14)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def shown(stop, pieces):
    scanner = StopScanner(stop)
    text = "".join(scanner.push(piece) for piece in pieces)
    return text + (scanner.finish() if scanner.matched is None else ""), scanner.matched


@given(TEXT, STOPS, st.lists(st.integers(0, 14), max_size=5))
def test_the_cut_into_pieces_changes_nothing(text, stop, cuts):
    at = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[low:high] for low, high in pairwise(at)]
    assert shown(stop, pieces) == shown(stop, [text]) == shown(stop, list(text))


@given(TEXT, STOPS)
def test_what_is_shown_ends_before_the_first_complete_stop_string(text, stop):
    out, matched = shown(stop, [text])
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(one) for one in stop)]
    if not ends:
        assert (out, matched) == (text, None)
    else:
        assert matched == max((one for one in stop if text[: ends[0]].endswith(one)), key=len)
        assert out == text[: ends[0] - len(matched)]


def test_only_a_possible_beginning_is_held_back():
    scanner = StopScanner(["</s>", "\n\n"])
    assert scanner.push("ab<") == "ab"
    assert scanner.push("/") == ""
    assert scanner.push("x\n") == "</x"
    assert scanner.push("y") == "\ny"
    assert scanner.push("z</s>tail") == "z"
    assert scanner.matched == "</s>"
    assert scanner.push("more") == ""


def test_text_before_min_tokens_passes():
    scanner = StopScanner(["ab"])
    assert scanner.push("xab", is_heeded=False) == "xab"
    assert scanner.matched is None
    assert scanner.push("ab") == ""
    assert scanner.matched == "ab"


@pytest.mark.parametrize(
    ("params", "token", "count", "matched", "expected"),
    [
        ({}, 5, 3, None, (None, None)),
        ({}, 2, 3, None, ("stop", None)),
        ({"ignore_eos": True}, 2, 3, None, (None, None)),
        ({"stop_token_ids": [5]}, 5, 3, None, ("stop", 5)),
        ({"ignore_eos": True, "stop_token_ids": [2]}, 2, 3, None, ("stop", 2)),
        ({"stop": "x"}, 5, 3, "x", ("stop", "x")),
        ({"max_tokens": 3}, 5, 3, None, ("length", None)),
        ({"max_tokens": 3}, 2, 3, None, ("stop", None)),
        ({"min_tokens": 4, "stop_token_ids": [5]}, 5, 3, None, (None, None)),
        ({"min_tokens": 3, "stop_token_ids": [5]}, 5, 3, None, ("stop", 5)),
    ],
)
def test_reasons_to_end(params, token, count, matched, expected):
    assert ending(token, count, SamplingParams(**params), [2], matched) == expected
