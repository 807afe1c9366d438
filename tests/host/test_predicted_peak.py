"""The peak of a tier that is planned, against what it really held: never under, and within 5 %."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_peaks import peaks
from published import llama
from tiny_models import CONFIGS, write_tiny

from zinfer.checkpoint.synthetic import write_checkpoint
from zinfer.plan import profile
from zinfer.spec import cost
from zinfer.spec.read import read_spec

pytestmark = pytest.mark.usefixtures("one_thread")

PASSES = {  # prompts, tokens to generate
    "prompt": ([100], 2),
    "prompts": ([128] * 4, 1),
    "short prompts": ([64] * 16, 2),
    "decode": ([1] * 16, 3),
    "one row": ([1], 3),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """52 MB of weights in matrices that are large beside attention's workspace, as in real models."""
    config = llama(1024, 2816, 2, 16, 4, 2000) | {"torch_dtype": "bfloat16"}
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(read_spec(config, None), config, folder, seed=7, dtype="BF16")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return {family: write_tiny(family, tmp_path_factory.mktemp(family) / "m") for family in CONFIGS}


def check(found):
    """The ledger never exceeded the plan, what was alive never exceeded it either, and it is no more than 5 % above."""
    for peak in found.values():
        assert peak.ledger <= peak.planned <= 1.05 * peak.ledger
        assert peak.live <= peak.activations
        assert peak.planned <= 1.05 * peak.seen


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_the_planned_peak_of_host_memory_is_what_is_held(wide, memory, name, exact):
    prompts, num_tokens = PASSES[name]
    budget = "256MiB" if memory == "resident" else "44MiB"
    full = {"max_batch": 12, "max_rows": 384} if (memory, name) == ("streamed", "short prompts") else {}
    found, rows, plan = peaks(wide, prompts, num_tokens, {"host": budget}, exact=exact, **full)
    assert bool(plan.placement.slots) is (memory == "streamed")
    assert rows == plan.workload.prefill_rows  # a pass was as full as was planned
    check(found)


@pytest.mark.parametrize("exact", [True, False])
def test_the_planned_peaks_of_a_device_and_host_memory_are_what_is_held(wide, exact):
    memory = {"device": "32MiB", "host": "24MiB"}
    found, _, plan = peaks(wide, [100] * 2, 2, memory, device="sim", exact=exact)
    assert plan.placement.slots
    assert plan.placement.staging
    assert set(found) == {"device", "host"}
    check(found)


@given(
    family=st.sampled_from(sorted(CONFIGS)),
    exact=st.booleans(),
    prompts=st.lists(st.integers(1, 90), min_size=1, max_size=9),
    num_tokens=st.integers(1, 4),
    rows=st.sampled_from(["auto", 16, 33, 64, 100]),
    micro_rows=st.sampled_from(["auto", 5, 16, 40]),
)
@settings(max_examples=20, deadline=None)
def test_nothing_alive_exceeds_the_plan(tiny, family, exact, prompts, num_tokens, rows, micro_rows):
    limits = {"max_rows": rows, "micro_rows": micro_rows, "max_batch": min(len(prompts), 4)}
    found, _, _ = peaks(tiny[family], prompts, num_tokens, {"host": "64MiB"}, exact=exact, **limits)
    assert found["host"].live <= found["host"].activations
    assert found["host"].ledger <= found["host"].planned


def without_results(monkeypatch):
    monkeypatch.setattr(cost._FlowBytes, "_size", lambda self, width: self.rows * width)  # half of bf16


def nothing_waits(monkeypatch):
    monkeypatch.setattr(profile, "waiting_bytes", lambda *_: 0)


def everything_waits_for_long(monkeypatch):
    plain = profile.waiting_bytes
    monkeypatch.setattr(profile, "waiting_bytes", lambda *args: 2 * plain(*args))


def attention_as_anywhere(monkeypatch):
    plain = cost.attention_workspace_bytes
    monkeypatch.setattr(
        cost, "attention_workspace_bytes", lambda *args, **named: plain(*args, **named | {"sizes": None})
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (without_results, "prompt"),
        (nothing_waits, "short prompts"),
        (everything_waits_for_long, "short prompts"),
        (attention_as_anywhere, "decode"),
    ],
)
def test_a_plan_that_counts_otherwise_is_found_out(wide, change, name, monkeypatch):
    change(monkeypatch)
    prompts, num_tokens = PASSES[name]
    found, _, _ = peaks(wide, prompts, num_tokens, {"host": "256MiB"}, exact=True)
    with pytest.raises(AssertionError):
        check(found)
