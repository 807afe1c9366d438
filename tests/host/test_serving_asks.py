"""Bodies as they come: TEI's forms, ours, and everything that is neither."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zinfer.config.schema import Serve
from zinfer.errors import IntegrityError, UsageError
from zinfer.serving.asks import EmbedInputs, PredictInputs, read_ask
from zinfer.serving.refusal import ERROR_TYPES, Refusal, as_refusal

LIMITS = Serve(max_texts=3, max_chars=10)


def read(body, kind="predict", limits=LIMITS):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_ask(raw, kind, limits)


@pytest.mark.parametrize(
    ("kind", "body", "texts", "is_one", "is_plain"),
    [
        ("predict", {"inputs": "a"}, ["a"], True, False),
        ("predict", {"inputs": ["a", "b"]}, [("a", "b")], True, False),
        ("predict", {"inputs": [["a"]]}, ["a"], False, False),
        ("predict", {"inputs": [["a"], ["b", "c"]]}, ["a", ("b", "c")], False, False),
        ("predict", {"texts": ["a", "b"]}, ["a", "b"], False, True),
        ("predict", {"texts": [["a", "b"], "c"]}, [("a", "b"), "c"], False, True),
        ("embed", {"inputs": "a"}, ["a"], False, False),
        ("embed", {"inputs": ["a", "b"]}, ["a", "b"], False, False),
        ("embed", {"texts": ["a", ["b", "c"]]}, ["a", ("b", "c")], False, True),
        ("embed", {"inputs": ""}, [""], False, False),
    ],
)
def test_forms(kind, body, texts, is_one, is_plain):
    ask = read(body, kind)
    assert (ask.given, ask.is_one, ask.is_plain) == (texts, is_one, is_plain)


def test_options_have_teis_names_and_defaults():
    ask = read({"inputs": "a"})
    assert isinstance(ask, PredictInputs)
    assert (ask.truncate, ask.truncation_direction, ask.raw_scores) == (None, "Right", False)
    ask = read(
        {"inputs": "a", "truncate": False, "truncation_direction": "left", "normalize": False}, "embed"
    )
    assert isinstance(ask, EmbedInputs)
    assert (ask.truncate, ask.truncation_direction, ask.normalize) == (False, "left", False)
    assert read({"texts": ["a"], "top_k": 2}).top_k == 2


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        (b"", 400, "ZI-1176", "no JSON object"),
        (b"[]", 400, "ZI-1176", "list"),
        (b'{"inputs": "a"', 400, "ZI-1176", "no JSON"),
        (b'{"inputs": "caf\xe9"}', 400, "ZI-1176", "utf-8"),
        (b'{"inputs": "\\ud800"}', 400, "ZI-1176", "surrogates"),
        (b'{"inputs": NaN}', 400, "ZI-1176", "NaN"),
        (b'{"inputs": "a", "truncate": Infinity}', 400, "ZI-1176", "Infinity"),
        (b'{"inputs": "a", "inputs": "b"}', 400, "ZI-1176", "twice"),
        (b"[" * 100_000, 400, "ZI-1176", "no JSON"),
        ({}, 422, "ZI-1177", "inputs is missing"),
        ({"input": "a"}, 422, "ZI-1177", "inputs is missing"),
        ({"inputs": "a", "raw_score": True}, 422, "ZI-1177", "did you mean 'raw_scores'"),
        ({"inputs": "a", "texts": ["a"]}, 422, "ZI-1177", "unknown field 'inputs'"),
        ({"inputs": "a", "truncate": "yes"}, 422, "ZI-1177", "truncate"),
        ({"inputs": "a", "truncate": 1}, 422, "ZI-1177", "truncate"),
        ({"inputs": "a", "truncation_direction": "up"}, 422, "ZI-1177", "truncation_direction"),
        ({"inputs": 7}, 422, "ZI-1177", "inputs"),
        ({"inputs": None}, 422, "ZI-1177", "inputs"),
        ({"inputs": []}, 422, "ZI-1177", "inputs"),
        ({"inputs": ["a", "b", "c"]}, 422, "ZI-1177", "pair"),
        ({"inputs": [["a", "b", "c"]]}, 422, "ZI-1177", "pair"),
        ({"inputs": [["a"], "b"]}, 422, "ZI-1177", "batch"),
        ({"texts": "a"}, 422, "ZI-1177", "a list of texts"),
        ({"texts": []}, 422, "ZI-1177", "texts"),
        ({"texts": [["a"]]}, 422, "ZI-1177", "texts"),
        ({"texts": ["a"], "top_k": 0}, 422, "ZI-1177", "top_k"),
        ({"texts": ["a"], "top_k": 1.5}, 422, "ZI-1177", "top_k"),
        ({"texts": ["a"] * 4}, 413, "ZI-1179", "4 texts"),
        ({"inputs": [["a"]] * 4}, 413, "ZI-1179", "4 texts"),
        ({"texts": ["a", "b" * 11]}, 413, "ZI-1180", "text 1 has 11"),
        ({"inputs": ["a", "b" * 11]}, 413, "ZI-1180", "text 0 has 11"),
    ],
)
def test_what_cannot_be_meant_is_named(body, status, code, says):
    with pytest.raises(Refusal) as caught:
        read(body)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert says in caught.value.message
    assert caught.value.remedy


def test_a_strangers_field_name_is_shown_escaped_and_short():
    with pytest.raises(Refusal) as caught:
        read({"inputs": "a", "\x1b[31m" + "x" * 5000: 1})
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 200


@given(st.binary(max_size=64), st.sampled_from(["predict", "embed"]))
def test_no_bytes_do_anything_but_an_ask_or_a_refusal(raw, kind):
    try:
        assert read_ask(raw, kind, LIMITS).given
    except Refusal as refusal:
        assert refusal.status in (400, 413, 422)
        assert json.loads(refusal.body())["error_type"] == "Validation"


def test_refusals_carry_the_error_and_teis_fields():
    refusal = Refusal(429, "ZI-2210", "full", remedy="later", retry_after_s=1.2)
    assert refusal.headers() == {"retry-after": "2"}
    assert json.loads(refusal.body()) == {
        "code": "ZI-2210",
        "message": "full",
        "remedy": "later",
        "error": "full",
        "error_type": "Overloaded",
        "retry_after_s": 1.2,
    }
    assert Refusal(429, "ZI-2210", "", remedy="", retry_after_s=0.001).headers() == {"retry-after": "1"}
    assert Refusal(503, "ZI-2212", "", remedy="", closes=True).headers() == {"connection": "close"}


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (UsageError("ZI-1131", "text 0", remedy="r"), 422, "Tokenizer"),
        (UsageError("ZI-1132", "text 0", remedy="r"), 422, "Tokenizer"),
        (IntegrityError("ZI-6001", "/secret/path block 3", remedy="zinfer verify /secret"), 424, "Backend"),
        (RuntimeError("/secret/path"), 424, "Backend"),
    ],
)
def test_failures_below_tell_clients_what_is_theirs_and_no_paths(error, status, kind):
    refusal = as_refusal(error)
    found = json.loads(refusal.body())
    assert (refusal.status, found["error_type"]) == (status, kind)
    assert kind in ERROR_TYPES
    assert "secret" not in str(found)
