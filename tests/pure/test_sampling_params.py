"""SamplingParams: defaults, refusals that name the closest match, and the mapping form with its alias."""

import dataclasses
import math

import pytest

from zinfer.errors import UsageError
from zinfer.sampling.params import SamplingParams


def test_defaults():
    assert dataclasses.asdict(SamplingParams()) == {
        "max_tokens": 16,
        "min_tokens": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "logprobs": None,
        "seed": None,
    }


def test_stop_takes_a_string_or_several():
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop == ("ab", "c")


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 3


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("max_token", "max_tokens"),
        ("max_new_tokens", "max_tokens"),
        ("temprature", "temperature"),
        ("topp", "top_p"),
    ],
)
def test_an_unknown_name_is_refused_with_the_closest(name, closest):
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{name: 1})
    assert caught.value.code == "ZI-1301"
    assert name in caught.value.message
    assert closest in caught.value.remedy


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(UsageError, match="xyzzy") as caught:
        SamplingParams(xyzzy=1)
    assert "min_tokens" in caught.value.remedy


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"max_tokens": None},
        {"min_tokens": -1},
        {"min_tokens": 17},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": True},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [1]},
        {"stop": 1},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": ["a"]},
        {"stop_token_ids": 5},
        {"ignore_eos": 1},
        {"logprobs": -1},
        {"logprobs": 10**6},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 0.5},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_name(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError) as caught:
        SamplingParams(**wrong)
    assert caught.value.code == "ZI-1302"
    assert caught.value.message.startswith(name)
    assert name in caught.value.remedy
    assert repr(value) in caught.value.message or name.startswith("stop")


def test_the_mapping_form_knows_the_alias():
    assert SamplingParams.from_dict({"max_new_tokens": 3, "seed": 5}) == SamplingParams(max_tokens=3, seed=5)
    with pytest.raises(UsageError, match="max_tokens"):
        SamplingParams.from_dict({"max_new_tokens": 3, "max_tokens": 3})
    with pytest.raises(UsageError, match="stops"):
        SamplingParams.from_dict({"stops": ["a"]})
